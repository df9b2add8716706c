"""Published checkpoints of the 3D encoders, read strictly: every tensor is used, dropped by a rule that is written
here, or named in the error.

- BrainMVP: ``{"state_dict": {"module.encoder.uniformer.*", "module.decoder.*", "module.rep_template"}, ...}``.
- BM-MAE: a flat dictionary, ``cls_token``, ``tokenizers.<modality>.*``, ``blocks.*``, ``norm.*`` and ``decoder.*``.
- BrainIAC: Lightning's ``{"state_dict": {"backbone.*", "projection_head.*"}, ...}``, or the backbone alone.

MONAI 1.4 and later save cross-attention tensors that self-attention never reads; they are dropped by name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from braindino.encoders.uniformer import DEPTHS, DIMS, UniFormer
from braindino.encoders.volume_transformer import HEAD_DIM, PATCH, BMMAETransformer, BrainIACTransformer
from braindino.weights import read_weight_file

MODALITIES = ("t1", "t1ce", "t2", "flair")
PUBLISHED_WIDTH, PUBLISHED_DEPTH = 768, 12
"""A file of the published width must be complete, not just as deep as the blocks it holds."""
_CROSS_ATTENTION = re.compile(r"blocks\.\d+\.(norm_cross_attn|cross_attn)\.")
_MAX_LISTED = 5

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class _Checkpoint:
    """The encoder's tensors of one file under our names, and what they are called in the file."""

    file: Path
    layout: str
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.file} ({self.layout} checkpoint): {problem}")

    def shape(self, key: str, ndim: int) -> torch.Size:
        """The shape of a tensor that the architecture is read off."""
        if key not in self.tensors:
            raise self.error(f"missing key {key!r}; is it another model's file?")
        if self.tensors[key].ndim != ndim:
            found = tuple(self.tensors[key].shape)
            raise self.error(f"misshapen key {self.names[key]!r}: expected {ndim} dimensions, found shape {found}")
        return self.tensors[key].shape

    def count(self, stem: str) -> int:
        """How many numbered blocks there are under ``stem``."""
        pattern = re.compile(rf"{re.escape(stem)}\.(\d+)\.")
        return len({match[1] for key in self.tensors if (match := pattern.match(key))})


def load_brainmvp(path: str | Path) -> UniFormer:
    """BrainMVP's UniFormer encoder, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown, missing, misshapen or non-finite tensors, or another kind of file.
    """
    found = _read(path, "BrainMVP", _brainmvp_name, expected="encoder.uniformer.patch_embed1.proj.weight")
    dims = tuple(found.shape(f"patch_embed{number}.norm.weight", 1)[0] for number in (1, 2, 3, 4))
    depths = DEPTHS if dims == DIMS else tuple(max(found.count(f"blocks{number}"), 1) for number in (1, 2, 3, 4))
    if any(dim % HEAD_DIM or not dim for dim in dims):
        raise found.error(f"stages of {dims} features; expected multiples of {HEAD_DIM}, the size of a head")
    in_channels = found.shape("patch_embed1.proj.weight", 5)[1]
    with torch.device("meta"):
        network = UniFormer(in_channels=in_channels, dims=dims, depths=depths)
    return _fill(network, found)


def load_bm_mae(path: str | Path) -> BMMAETransformer:
    """BM-MAE's encoder with the tokenizers that the file holds, float32. Raises as ``load_brainmvp``."""
    found = _read(path, "BM-MAE", _bm_mae_name, expected="cls_token")
    present = {key.split(".")[1] for key in found.tensors if key.startswith("tokenizers.")}
    if not present or present - set(MODALITIES):
        raise found.error(f"tokenizers for {sorted(present) or 'nothing'}; expected some of {', '.join(MODALITIES)}")
    modalities = [name for name in MODALITIES if name in present]
    width, depth, mlp_dim, grid = _transformer_sizes(found, f"tokenizers.{modalities[0]}.patch_embedding.")
    if width % 6:
        raise found.error(f"{width} features; expected a multiple of 6, for positions in three dimensions")
    # Their constructor computes fixed positions, which a network without memory cannot hold.
    network = BMMAETransformer(modalities=modalities, width=width, depth=depth, mlp_dim=mlp_dim, grid=grid)
    return _fill(network, found)


def load_brainiac(path: str | Path) -> BrainIACTransformer:
    """BrainIAC's ViT (the current version, not the ResNet of the first), float32. Raises as ``load_brainmvp``."""
    found = _read(path, "BrainIAC", _brainiac_name, expected="backbone.patch_embedding.patch_embeddings.weight")
    width, depth, mlp_dim, grid = _transformer_sizes(found, "patch_embedding.")
    with torch.device("meta"):
        network = BrainIACTransformer(width=width, depth=depth, mlp_dim=mlp_dim, grid=grid)
    return _fill(network, found)


def _brainmvp_name(key: str) -> str | None:
    """Our name of a tensor; empty for one that is dropped, None for an unknown one."""
    key = key.removeprefix("module.")
    if key == "rep_template" or key.startswith("decoder."):
        return ""
    if not key.startswith("encoder."):
        return None
    return key.removeprefix("encoder.").removeprefix("uniformer.")


def _bm_mae_name(key: str) -> str | None:
    if key.startswith("decoder.") or _CROSS_ATTENTION.match(key):
        return ""
    return key if key == "cls_token" or key.startswith(("tokenizers.", "blocks.", "norm.")) else None


def _brainiac_name(key: str) -> str | None:
    if key.startswith(("projection_head.", "projection.", "head.")):
        return ""
    key = key.removeprefix("backbone.")
    if _CROSS_ATTENTION.match(key):
        return ""
    return key if key.startswith(("patch_embedding.", "blocks.", "norm.")) else None


def _read(path: str | Path, layout: str, rename: Any, *, expected: str) -> _Checkpoint:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no {layout} checkpoint at {file}; give the path of the file that its authors publish")
    try:
        content = read_weight_file(file)
    except ValueError as error:
        if "refused because" not in str(error):
            raise
        raise ValueError(
            f"{error}. If you trust its source, keep the tensors alone, on a machine that may run its code: "
            'torch.save({"state_dict": torch.load(FILE, weights_only=False)["state_dict"]}, NEW_FILE)'
        ) from error
    if isinstance(content.get("state_dict"), Mapping):
        content = dict(content["state_dict"])
    checkpoint = _Checkpoint(file, layout, {}, {})
    unknown = []
    for name, value in content.items():
        key = rename(str(name))
        if key == "":
            continue
        if key is None:
            unknown.append(str(name))
        elif not isinstance(value, torch.Tensor):
            raise checkpoint.error(f"key {name!r} is a {type(value).__name__}, expected a tensor")
        elif key in checkpoint.tensors:
            raise checkpoint.error(f"keys {checkpoint.names[key]!r} and {name!r} are the same tensor {key!r}")
        else:
            checkpoint.tensors[key], checkpoint.names[key] = value, str(name)
    if unknown:
        raise checkpoint.error(
            f"unknown {_listed([repr(name) for name in unknown])}; expected keys like {expected!r}. Is it another "
            "model's file, or one that was saved with a head of its own?"
        )
    return checkpoint


def _transformer_sizes(found: _Checkpoint, embedding: str) -> tuple[int, int, int, int]:
    """Width, depth, MLP width and edge of the token grid."""
    width = found.shape("norm.weight", 1)[0]
    num_tokens = found.shape(f"{embedding}position_embeddings", 3)[1]
    grid = round(num_tokens ** (1 / 3))
    if grid**3 != num_tokens or grid < 2:
        raise found.error(f"{num_tokens} positions; expected those of a cube, such as 216 or 512")
    kernel = tuple(found.shape(f"{embedding}patch_embeddings.weight", 5)[2:])
    if kernel != (PATCH,) * 3 or width % HEAD_DIM:
        raise found.error(
            f"patches of {kernel} voxels and {width} features; expected {(PATCH,) * 3} and a multiple of {HEAD_DIM}"
        )
    depth = PUBLISHED_DEPTH if width == PUBLISHED_WIDTH else max(found.count("blocks"), 1)
    return width, depth, found.shape("blocks.0.mlp.linear1.weight", 2)[0], grid


def _fill(network: Network, found: _Checkpoint) -> Network:
    """The network with the tensors, after checking that they are exactly the ones it has."""
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in found.tensors.items()}
    problems = [f"missing key {key!r}: expected {expected[key]}" for key in expected if key not in shapes]
    problems += [f"unknown key {found.names[key]!r}: found {shapes[key]}" for key in shapes if key not in expected]
    problems += [
        f"misshapen key {found.names[key]!r}: expected {expected[key]}, found {shapes[key]}"
        for key in expected
        if key in shapes and shapes[key] != expected[key]
    ]
    problems += [
        f"key {found.names[key]!r} holds values that are not finite"
        for key, value in found.tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if problems:
        raise found.error(_listed(problems))
    state = {key: value.float() if value.is_floating_point() else value for key, value in found.tensors.items()}
    network.load_state_dict(state, strict=True, assign=True)
    return network


def _listed(problems: list[str]) -> str:
    more = f" (and {len(problems) - _MAX_LISTED} more)" if len(problems) > _MAX_LISTED else ""
    return "; ".join(problems[:_MAX_LISTED]) + more
