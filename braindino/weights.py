"""Encoder weights: one door out (``save_encoder``), one door in (``load_encoder``), and the layouts other programs use.

Native format, version 1: a safetensors file whose header holds the architecture, the input contract, package
versions, the fingerprint of the training data and the hash of the weights; beside it a JSON file with the same facts
for people, never read back. Nothing that could run code is unpickled, and no key is skipped, guessed or left over:
every tensor of a file is used or named in the error, the knowingly dropped ones (heads of a teacher file, biases that
are all zero) apart.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from braindino.atomic import replace_file, write_json
from braindino.provenance import versions
from braindino.records import read_json
from braindino.vision_transformer import ARCHITECTURES, INPUT_CHANNELS, RotaryEmbedding, VisionTransformer

FORMAT = "braindino-encoder"
FORMAT_VERSION = 1
ENCODER_FILE = "encoder.safetensors"
UNTRAINED_PREFIX = "untrained:"
UNTRAINED_SEED = 0

HEAD_DIM = 64
"""Features per attention head in every published DINOv3 ViT; files do not say, so heads = embed_dim / 64."""
TEACHER_EPS, RELEASED_EPS = 1e-6, 1e-5
"""LayerNorm eps is in no weight file: DINOv3's training code builds with 1e-6, its released models with 1e-5."""
EPS_KEY = "layer_norm_eps"
"""Where the header of a timm file that we wrote states its LayerNorm eps; timm does not read it."""
PUBLISHED_DEPTHS = {384: 12, 768: 12, 1024: 24}
"""Blocks by width; a file of one of these widths must be complete, not just as deep as the blocks it holds."""

TEACHER_HEADS = ("dino_head.", "ibot_head.")
_WRAPPER = "_checkpoint_wrapped_module."
_MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class InputContract:
    """What an encoder expects of its input; the defaults are the pipeline of the paper (sec. 4.1.2)."""

    channels: int = 3
    channel_source: str = "one grey channel, replicated"
    intensity: str = (
        "per volume: clipped to the 0.5-99.5 percentile, z-score with the mean and standard deviation "
        "of non-zero voxels, background 0"
    )
    image_size: int = 256
    """Height and width of a slice in pixels."""
    orientation: str = "row 0 anterior, column 0 patient right (radiological)"
    slice_axis: str = "axial"


FOREIGN_CONTRACT = replace(InputContract(), intensity="not stated in the file; taken as " + InputContract().intensity)
"""For layouts that say nothing about their input."""


def save_encoder(
    encoder: VisionTransformer,
    path: str | Path,
    *,
    contract: InputContract | None = None,
    data_fingerprint: str = "",
    notes: str = "",
) -> Path:
    """Write the encoder in float32 and return the path of its safetensors file; the file appears whole or not at all.

    ``path`` is a folder (made if needed; gets ``encoder.safetensors`` and ``encoder.json``) or a ``*.safetensors``
    file. ``contract``: None keeps the one the encoder was loaded with, or else the paper's. ``data_fingerprint``
    identifies the training data (``SliceStore.fingerprint``), ``notes`` is free text. Raises ValueError for weights
    that are not finite.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise ValueError(
            f"{path}: the native format is a folder or a .safetensors file; for a teacher file use "
            "torch.save(to_teacher_state(encoder), path)"
        )
    file = path if path.suffix == ".safetensors" else path / ENCODER_FILE
    state = _float_state(encoder)
    _check_finite(state, {}, f"{file} (not written)")
    facts: dict[str, Any] = {
        "architecture": encoder.architecture,
        "input_contract": asdict(contract or encoder.contract or InputContract()),
        "versions": versions(),
        "data_fingerprint": data_fingerprint,
        "notes": notes,
        "sha256": hash_weights(state),
    }
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    with replace_file(file) as temporary:
        save_file(state, temporary, metadata={"format": FORMAT, "format_version": str(FORMAT_VERSION), **header})
        _sort_header(temporary)
    about = "For people. load_encoder reads the header of the .safetensors file, never this."
    counts = {"tensors": len(state), "parameters": sum(p.numel() for p in encoder.parameters())}
    write_json(file.with_suffix(".json"), {"about": about, "format_version": FORMAT_VERSION, **facts, **counts})
    return file


def load_encoder(path_or_name: str | Path, *, device: str | torch.device = "cpu") -> VisionTransformer:
    """The frozen encoder: float32, eval mode, no gradients, with its ``name``, ``sha256`` and ``contract``.

    ``path_or_name``: a folder or file written by ``save_encoder``; a teacher file ({"teacher": {"backbone.*"}});
    DINOv3 weights in the official, timm or Hugging Face layout (a folder with ``config.json``, or the file); or
    "untrained:vit_base" and so on, random weights of seed 0; or "untrained:PATH", random weights of the architecture
    of the encoder at PATH. For foreign files the architecture is read off the shapes, with LayerNorm eps 1e-6 for
    teacher files and for flat ones without qkv bias (DINOv3's training style), otherwise 1e-5 unless a ``config.json``
    or the header of a timm file exported by ``braindino export`` says more.

    Raises ValueError naming file, key, expected and found for an unknown, missing, misshapen or non-finite tensor,
    for a damaged file and for one that holds more than tensors; FileNotFoundError when there is nothing at the path.
    """
    text = str(path_or_name)
    if text.startswith(UNTRAINED_PREFIX):
        encoder = _build_untrained(text.removeprefix(UNTRAINED_PREFIX))
    else:
        encoder = _load_file(find_encoder_file(path_or_name))
    return encoder.to(device).eval().requires_grad_(False)


def hash_weights(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) over names, shapes and float32 bytes of a native state dict: equal for equal weights in any layout.

    The mask token is left out: it has no part in a feature, and timm files do not carry it.
    """
    digest = hashlib.sha256()
    for key in sorted(set(state) - {"mask_token"}):
        tensor = state[key].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def to_teacher_state(encoder: VisionTransformer) -> dict[str, dict[str, torch.Tensor]]:
    """{"teacher": {"backbone.*"}}: the layout of DINOv3's training code and of the BrainDINO and MedDINOv3 loaders.

    Without heads; write it with ``torch.save``. Those loaders build with LayerNorm eps 1e-6.
    """
    return {"teacher": {f"backbone.{key}": value for key, value in _float_state(encoder).items()}}


def to_timm_state(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
    """The state dict that timm's ``vit_base_patch16_dinov3`` (and its other sizes) loads strictly.

    Build it with ``create_model(name, num_classes=0, norm_layer=partial(LayerNorm, eps=1e-6))``, or the eps of the
    encoder's architecture; for an encoder with qkv bias the name ends in ``_qkvb``.
    timm has no mask token and computes the RoPE periods itself: for periods that were rounded to bfloat16 by another
    program copy them, ``model.rope.periods.copy_(encoder.rope_embed.periods)``. Raises ValueError for a key bias that
    is not zero, which timm cannot hold.
    """
    state: dict[str, torch.Tensor] = {}
    for key, value in _float_state(encoder).items():
        if key in ("mask_token", "rope_embed.periods"):
            continue
        if key.endswith("attn.qkv.bias"):
            q_bias, k_bias, v_bias = value.chunk(3)
            if k_bias.any():
                raise ValueError(f"{key!r}: its key part is not zero; timm's DINOv3 has no key bias")
            stem = key.removesuffix("qkv.bias")
            state |= {f"{stem}q_bias": q_bias.clone(), f"{stem}v_bias": v_bias.clone()}
        else:
            state[_foreign_name(key, "timm")] = value
    return state


def to_dinov3_state(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
    """The flat state dict of DINOv3's released files, which its hub and its class with ``qkv_bias=True,
    mask_k_bias=True`` load strictly: a qkv bias in every block, and the mask that it is multiplied by.

    For an encoder without qkv bias both are zeros, as in the released files. The hub builds with LayerNorm eps 1e-5:
    for another one set it on the loaded model.
    """
    state = _float_state(encoder)
    for number in range(encoder.depth):
        key = f"blocks.{number}.attn.qkv.bias"
        bias = state.setdefault(key, torch.zeros(3 * encoder.embed_dim))
        mask = torch.full_like(bias, float(encoder.architecture["qkv_bias"]))
        _, k_bias, _ = bias.chunk(3)
        mask.chunk(3)[1].mul_(float(k_bias.any()))
        state[f"{key}_mask"] = mask
    return state


def to_hugging_face_state(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
    """The tensors of a ``model.safetensors`` that ``transformers.DINOv3ViTModel`` loads, with
    ``to_hugging_face_config`` as the ``config.json`` beside it.

    transformers computes the RoPE periods itself, from ``rope_theta``.
    """
    state: dict[str, torch.Tensor] = {}
    for key, value in _float_state(encoder).items():
        if key == "rope_embed.periods":
            continue
        if ".attn.qkv." in key:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                state[_foreign_name(key.replace("qkv", f"{part}_proj"), "Hugging Face")] = tensor.clone()
        else:
            state[_foreign_name(key, "Hugging Face")] = value[None] if key == "mask_token" else value
    return state


def to_hugging_face_config(encoder: VisionTransformer) -> dict[str, Any]:
    """The ``config.json`` of a ``transformers.DINOv3ViTModel`` with the same features."""
    architecture = encoder.architecture
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "dtype": "float32",
        "hidden_size": architecture["embed_dim"],
        "intermediate_size": architecture["mlp_ratio"] * architecture["embed_dim"],
        "num_hidden_layers": architecture["depth"],
        "num_attention_heads": architecture["num_heads"],
        "patch_size": architecture["patch_size"],
        "num_register_tokens": architecture["num_storage_tokens"],
        "image_size": (encoder.contract or InputContract()).image_size,
        "num_channels": INPUT_CHANNELS,
        "hidden_act": "gelu",
        "use_gated_mlp": False,
        "layer_norm_eps": architecture["layer_norm_eps"],
        "layerscale_value": architecture["layer_scale_init"],
        "query_bias": architecture["qkv_bias"],
        "key_bias": architecture["qkv_bias"],
        "value_bias": architecture["qkv_bias"],
        "proj_bias": True,
        "mlp_bias": True,
        "rope_theta": architecture["rope_base"],
        # Theirs are drawn anew in training only; the paper's recipe has none.
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
    }


def load_heads(path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """The projection heads of a teacher file, float32: ``{"dino_head": {"mlp.0.weight": ...}, "ibot_head": ...}``.

    Empty for the other layouts, which hold none; a head that a teacher file lacks is left out. Raises as
    ``load_encoder`` does for a damaged file and for tensors that are not finite.
    """
    file = find_encoder_file(path)
    content = read_weight_file(file)
    if isinstance(content.get("teacher"), dict):
        content = content["teacher"]
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in content.items():
        head, _, parameter = str(name).replace(_WRAPPER, "").partition(".")
        if f"{head}." not in TEACHER_HEADS:
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{file}: key {name!r} is a {type(value).__name__}, expected a tensor")
        _check_finite({str(name): value}, {}, str(file))
        heads.setdefault(head, {})[parameter] = value.to(torch.float32)
    return heads


def read_facts(path_or_name: str | Path) -> dict[str, str]:
    """What a native file's header states beside the weights (``versions`` is JSON, ``notes`` and ``data_fingerprint``
    are text); empty for the other layouts and for untrained encoders."""
    if str(path_or_name).startswith(UNTRAINED_PREFIX):
        return {}
    file = find_encoder_file(path_or_name)
    if file.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
        header = opened.metadata() or {}
    return header if header.get("format") == FORMAT else {}


def read_weight_file(file: Path) -> dict[str, Any]:
    """The dictionary that a .safetensors file or a PyTorch pickle holds, tensors and plain values only.

    Raises ValueError for a damaged file and for one that holds objects that reading could run.
    """
    return _read_safetensors(file)[1] if file.suffix == ".safetensors" else _read_pickle(file)


def find_encoder_file(path: str | Path) -> Path:
    """The file that ``load_encoder`` reads for a folder or a file.

    Raises FileNotFoundError when there is no encoder; says what may be given.
    """
    path = Path(path)
    if path.is_file():
        return path
    candidates = [path / ENCODER_FILE, path / "model.safetensors", path / "pytorch_model.bin"]
    for file in candidates:
        if file.is_file():
            return file
    if path.is_dir():
        expected = " or ".join(file.name for file in candidates)
        hint = f"; did you mean {path / 'encoder'}?" if (path / "encoder" / ENCODER_FILE).is_file() else ""
        raise FileNotFoundError(f"{path}: a folder without encoder weights, expected {expected} in it{hint}")
    raise FileNotFoundError(
        f"no encoder at {path}. Give the path of one: the folder RUN/encoder of a pretraining run, a teacher .pth, or "
        "DINOv3 weights that you downloaded (official .pth, timm or Hugging Face file or folder); or the name "
        f"{UNTRAINED_PREFIX}vit_base for random weights"
    )


@dataclass(frozen=True)
class _Weights:
    """The tensors of one file under native names, and what is needed to speak about them in its own words."""

    file: Path
    layout: str
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]  # native name -> name in the file

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.file} ({self.layout} layout): {problem}")


# The names in which a layout differs from the native one: name in the file -> native name, {} for the block's number.
_RENAMES: dict[str, dict[str, str]] = {
    "native": {},
    "teacher": {},
    "DINOv3": {},
    "timm": {
        "reg_token": "storage_tokens",
        "blocks.{}.gamma_1": "blocks.{}.ls1.gamma",
        "blocks.{}.gamma_2": "blocks.{}.ls2.gamma",
    },
    "Hugging Face": {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.register_tokens": "storage_tokens",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
        "layer.{}.layer_scale1.lambda1": "blocks.{}.ls1.gamma",
        "layer.{}.layer_scale2.lambda1": "blocks.{}.ls2.gamma",
        **{
            f"layer.{{}}.{theirs}.{kind}": f"blocks.{{}}.{ours}.{kind}"
            for theirs, ours in (
                ("norm1", "norm1"),
                ("attention.q_proj", "attn.q_proj"),
                ("attention.k_proj", "attn.k_proj"),
                ("attention.v_proj", "attn.v_proj"),
                ("attention.o_proj", "attn.proj"),
                ("norm2", "norm2"),
                ("mlp.up_proj", "mlp.fc1"),
                ("mlp.down_proj", "mlp.fc2"),
            )
            for kind in ("weight", "bias")
        },
    },
}


def _sort_header(file: Path) -> None:
    """Put the facts of a safetensors header into alphabetical order, in place: safetensors writes them in an order that
    changes from call to call, and equal encoders should be equal files."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, "the header has grown"
        handle.seek(8)
        handle.write(text)


def _build_untrained(name: str) -> VisionTransformer:
    """Random weights of an architecture: one with a name, or that of the encoder at a path."""
    if name in ARCHITECTURES:
        architecture, label = {}, name
        build = ARCHITECTURES[name]
    elif Path(name).exists():
        like = _load_file(find_encoder_file(name))
        architecture, label = like.architecture, f"like-{like.name}"
        build = VisionTransformer
    else:
        choices = ", ".join(UNTRAINED_PREFIX + known for known in ARCHITECTURES)
        raise ValueError(
            f"no architecture {name!r} for {UNTRAINED_PREFIX + name!r}; choose one of {choices}, "
            f"or {UNTRAINED_PREFIX}PATH for the architecture of the encoder at PATH"
        )
    # The constructor draws too; the caller's global generator must not notice.
    with torch.random.fork_rng(devices=[]):
        encoder = build(**architecture)
    encoder.initialize(torch.Generator().manual_seed(UNTRAINED_SEED))
    encoder.name = f"untrained-{label}"
    encoder.sha256 = hash_weights(encoder.state_dict())
    encoder.contract = InputContract()
    return encoder


def _load_file(file: Path) -> VisionTransformer:
    header, content = _read_safetensors(file) if file.suffix == ".safetensors" else ({}, _read_pickle(file))
    if header.get("format") == FORMAT:
        encoder = _load_native(_Weights(file, "native", content, {key: key for key in content}), header)
    else:
        encoder = _load_foreign(_recognise(file, content), header)
    encoder.name = _name(file)
    return encoder


def _name(file: Path) -> str:
    """The most telling part of the path: generic names (RUN/encoder/encoder.safetensors) give way to their folder's."""
    parts = [file.stem, *(parent.name for parent in file.resolve().parents)]
    return next((part for part in parts if part and part not in ("encoder", "model", "pytorch_model")), file.stem)


def _read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            return opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or write it again") from error


def _read_pickle(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; every one of them means the same to the user
        first_line = next(iter(str(error).splitlines()), "")
        if "Unsupported" in str(error):
            problem = "holds pickled objects other than tensors, which are refused because reading them can run code"
        else:
            problem = "is damaged, half-written or not a PyTorch file"
        raise ValueError(f"{file}: {problem} ({type(error).__name__}: {first_line})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(content).__name__}")
    return content


def _load_native(weights: _Weights, header: Mapping[str, str]) -> VisionTransformer:
    version = header.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise weights.error(f"format_version {version!r}, expected '{FORMAT_VERSION}'; a newer braindino may read it")
    try:
        architecture = json.loads(header["architecture"])
        contract = InputContract(**json.loads(header["input_contract"]))
        expected_hash = header["sha256"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise weights.error(f"damaged header ({type(error).__name__}: {error})") from error
    encoder = _fill(architecture, weights)
    encoder.sha256 = hash_weights(encoder.state_dict())
    if encoder.sha256 != expected_hash:
        raise weights.error(f"damaged: the weights hash to {encoder.sha256}, the header says {expected_hash}")
    encoder.contract = contract
    return encoder


def _load_foreign(weights: _Weights, header: Mapping[str, str]) -> VisionTransformer:
    has_qkv_bias_keys = any(key.endswith("attn.qkv.bias") for key in weights.tensors)
    weights = _settle_bias(_fuse_qkv(weights))
    architecture = _infer_architecture(weights, has_qkv_bias_keys=has_qkv_bias_keys)
    if EPS_KEY in header and weights.layout == "timm":
        architecture["layer_norm_eps"] = float(header[EPS_KEY])
    fixed: dict[str, torch.Tensor] = {}
    if weights.layout == "timm":
        fixed["mask_token"] = torch.zeros(1, architecture["embed_dim"])
    if weights.layout in ("timm", "Hugging Face"):
        head_dim = architecture["embed_dim"] // architecture["num_heads"]
        fixed["rope_embed.periods"] = RotaryEmbedding(head_dim, architecture["rope_base"]).periods
    encoder = _fill(architecture, replace(weights, tensors={**fixed, **weights.tensors}))
    encoder.sha256 = hash_weights(encoder.state_dict())
    encoder.contract = FOREIGN_CONTRACT
    return encoder


def _fill(architecture: dict[str, Any], weights: _Weights) -> VisionTransformer:
    """The network of this architecture holding these tensors, after checking that they are exactly the ones it has."""
    try:
        with torch.device("meta"):
            encoder = VisionTransformer(**architecture)
    except (TypeError, ValueError) as error:
        raise weights.error(f"cannot build its architecture {architecture}: {error}") from error
    if encoder.architecture != architecture:
        raise weights.error(f"architecture has keys {sorted(architecture)}, expected {sorted(encoder.architecture)}")
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.tensors.items()}
    problems = [
        f"missing key {_in_file(weights, key)}: expected {expected[key]}" for key in expected if key not in found
    ]
    problems += [f"unknown key {_in_file(weights, key)}: found {found[key]}" for key in found if key not in expected]
    problems += [
        f"misshapen key {_in_file(weights, key)}: expected {expected[key]}, found {found[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    if problems:
        more = f" (and {len(problems) - _MAX_LISTED} more)" if len(problems) > _MAX_LISTED else ""
        raise weights.error("; ".join(problems[:_MAX_LISTED]) + more)
    _check_finite(weights.tensors, weights.names, f"{weights.file} ({weights.layout} layout)")
    state = {key: value.to(torch.float32) for key, value in weights.tensors.items()}
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder


def _in_file(weights: _Weights, key: str) -> str:
    """How the file calls, or would call, the tensor we call ``key``."""
    return repr(weights.names.get(key) or _foreign_name(key, weights.layout))


def _foreign_name(key: str, layout: str) -> str:
    """The name in ``layout`` of the tensor we call ``key``."""
    inverse = {ours: theirs for theirs, ours in _RENAMES[layout].items()}
    return ("backbone." if layout == "teacher" else "") + _rename(key, inverse)


def _native_name(key: str, layout: str) -> str:
    key = key.replace(_WRAPPER, "")
    if layout == "teacher":
        key = key.removeprefix("backbone.")
    if layout == "Hugging Face" and key.startswith("model.layer."):  # as transformers 5 names them in memory
        key = key.removeprefix("model.")
    return _rename(key, _RENAMES[layout])


def _rename(key: str, table: Mapping[str, str]) -> str:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", key)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", key)
    return table[pattern].format(*numbers) if pattern in table else key


def _check_finite(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], where: str) -> None:
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {names.get(key, key)!r} holds {tensor.dtype}, expected floating-point numbers")
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{where}: {names.get(key, key)!r} holds {bad} values that are not finite")


def _float_state(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
    """The native state dict: own float32 copies on the CPU."""
    return {
        key: value.detach().to("cpu", torch.float32, copy=True).contiguous()
        for key, value in encoder.state_dict().items()
    }


def _recognise(file: Path, content: dict[str, Any]) -> _Weights:
    """Tell the layout by its keys and give every tensor its native name."""
    is_teacher = isinstance(content.get("teacher"), dict)
    if is_teacher:
        content = content["teacher"]
    keys = {str(key).replace(_WRAPPER, "") for key in content}
    if is_teacher or "backbone.cls_token" in keys:
        layout = "teacher"
    elif "embeddings.cls_token" in keys or "embeddings.register_tokens" in keys:
        layout = "Hugging Face"
    elif "reg_token" in keys:
        layout = "timm"
    elif "storage_tokens" in keys or "rope_embed.periods" in keys:
        layout = "DINOv3"
    else:
        raise ValueError(
            f"{file}: not a known layout; its first keys are {sorted(map(str, content))[:_MAX_LISTED]}, expected those "
            "of a teacher ('backbone.*'), DINOv3 ('storage_tokens'), timm ('reg_token'), Hugging Face ('embeddings.*')"
        )
    weights = _Weights(file, layout, {}, {})
    for name, value in content.items():
        key = str(name)
        plain = key.replace(_WRAPPER, "")
        if layout == "teacher" and plain.startswith(TEACHER_HEADS):
            continue
        if layout == "teacher" and not plain.startswith("backbone."):
            raise weights.error(f"unknown key {key!r}: expected 'backbone.*', or a head ({' or '.join(TEACHER_HEADS)})")
        if not isinstance(value, torch.Tensor):
            raise weights.error(f"key {key!r} is a {type(value).__name__}, expected a tensor")
        native = _native_name(key, layout)
        if native in weights.tensors:
            raise weights.error(f"keys {weights.names[native]!r} and {key!r} are the same tensor {native!r}")
        # Hugging Face keeps the mask token as a sequence of length one, (1, 1, D).
        is_sequence = layout == "Hugging Face" and native == "mask_token" and value.ndim == 3
        weights.tensors[native] = value[0] if is_sequence else value
        weights.names[native] = key
    return weights


def _take(weights: _Weights, key: str, ndim: int) -> torch.Tensor:
    """The tensor ``key``, which the architecture is read off; an error when it is missing or has other dimensions."""
    if key not in weights.tensors:
        raise weights.error(f"missing key {_in_file(weights, key)}")
    tensor = weights.tensors[key]
    if tensor.ndim != ndim:
        raise weights.error(
            f"misshapen key {_in_file(weights, key)}: expected {ndim} dimensions, found shape {tuple(tensor.shape)}"
        )
    return tensor


def _block_numbers(weights: _Weights) -> list[int]:
    return sorted({int(match[1]) for key in weights.tensors if (match := re.match(r"blocks\.(\d+)\.", key))})


def _fuse_qkv(weights: _Weights) -> _Weights:
    """Separate query, key and value tensors become the one qkv tensor of the native layout."""
    if weights.layout not in ("timm", "Hugging Face"):
        return weights
    width = _take(weights, "cls_token", 3).shape[-1]
    tensors, names = dict(weights.tensors), dict(weights.names)

    def fuse(target: str, parts: list[str], shape: tuple[int, ...], optional: str = "") -> None:
        for key in parts:
            if key not in tensors and key != optional:
                raise weights.error(f"missing key {_in_file(weights, key)}: expected {shape}")
            if key in tensors and tuple(tensors[key].shape) != shape:
                found = tuple(tensors[key].shape)
                raise weights.error(f"misshapen key {_in_file(weights, key)}: expected {shape}, found {found}")
        tensors[target] = torch.cat([tensors.pop(key) if key in tensors else torch.zeros(shape) for key in parts])
        names[target] = " + ".join(names.pop(key) for key in parts if key in names)

    for number in _block_numbers(weights):
        stem = f"blocks.{number}.attn."
        if weights.layout == "Hugging Face":
            fuse(f"{stem}qkv.weight", [f"{stem}{part}_proj.weight" for part in "qkv"], (width, width))
            bias_parts = [f"{stem}{part}_proj.bias" for part in "qkv"]
        else:
            bias_parts = [f"{stem}{part}_bias" for part in "qkv"]
        if any(key in tensors for key in bias_parts):
            fuse(f"{stem}qkv.bias", bias_parts, (width,), optional=bias_parts[1])
    return replace(weights, tensors=tensors, names=names)


def _settle_bias(weights: _Weights) -> _Weights:
    """The qkv biases as they act, that is times their mask, or none at all when every one of them is zero.

    Released DINOv3 files hold biases and masks of zeros. A mask of NaN was never initialised (a defect of early
    training code); where the bias is zero as well nothing is lost, otherwise its meaning is unknown.
    """
    tensors = dict(weights.tensors)
    shape = (3 * _take(weights, "cls_token", 3).shape[-1],)
    biases = {}
    for number in _block_numbers(weights):
        key = f"blocks.{number}.attn.qkv.bias"
        if key not in tensors:
            continue
        bias, mask = tensors[key], tensors.pop(f"{key}_mask", None)
        for name, value in ((key, bias), (f"{key}_mask", mask)):
            if value is not None and tuple(value.shape) != shape:
                found = tuple(value.shape)
                raise weights.error(f"misshapen key {_in_file(weights, name)}: expected {shape}, found {found}")
        if mask is not None and mask.isnan().any() and bias.any():
            name = _in_file(weights, f"{key}_mask")
            raise weights.error(f"key {name} is not a number although its bias is not zero")
        biases[key] = bias if mask is None or not bias.any() else bias * mask
    missing = [number for number in _block_numbers(weights) if f"blocks.{number}.attn.qkv.bias" not in biases]
    if biases and missing:
        key = f"blocks.{missing[0]}.attn.qkv.bias"
        raise weights.error(f"missing key {_in_file(weights, key)}: {len(biases)} other blocks have one")
    if any(bias.any() for bias in biases.values()):
        return replace(weights, tensors=tensors | biases)
    return replace(weights, tensors={key: value for key, value in tensors.items() if key not in biases})


def _infer_architecture(weights: _Weights, *, has_qkv_bias_keys: bool) -> dict[str, Any]:
    """Constructor values from the shapes, and from the ``config.json`` beside a Hugging Face file."""
    width = _take(weights, "cls_token", 3).shape[-1]
    config = _read_config(weights)
    if width % HEAD_DIM and "num_attention_heads" not in config:
        raise weights.error(f"embed_dim {width} is not a multiple of {HEAD_DIM}, the head size of every DINOv3 ViT")
    released = weights.layout in ("timm", "Hugging Face") or (weights.layout == "DINOv3" and has_qkv_bias_keys)
    return {
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", PUBLISHED_DEPTHS.get(width, len(_block_numbers(weights)))),
        "num_heads": config.get("num_attention_heads", width // HEAD_DIM),
        "patch_size": _take(weights, "patch_embed.proj.weight", 4).shape[-1],
        "num_storage_tokens": _take(weights, "storage_tokens", 3).shape[1],
        "mlp_ratio": _take(weights, "blocks.0.mlp.fc1.weight", 2).shape[0] // width,
        "layer_scale_init": 1e-5,
        "layer_norm_eps": config.get("layer_norm_eps", RELEASED_EPS if released else TEACHER_EPS),
        "qkv_bias": any(key.endswith("attn.qkv.bias") for key in weights.tensors),
        "rope_base": float(config.get("rope_theta", 100.0)),
    }


def _read_config(weights: _Weights) -> dict[str, Any]:
    file = weights.file.with_name("config.json")
    if weights.layout != "Hugging Face" or not file.is_file():
        return {}
    config = read_json(file)
    if config.get("model_type") != "dinov3_vit" or config.get("hidden_act", "gelu") != "gelu":
        found = (config.get("model_type"), config.get("hidden_act", "gelu"))
        raise ValueError(f"{file}: expected model_type 'dinov3_vit' with hidden_act 'gelu', found {found}")
    return config
