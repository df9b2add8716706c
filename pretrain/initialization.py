"""Where a run's student and teacher start: from another run, or from an encoder that somebody published.

Whatever is started from must have the shape of the encoder that the run's settings describe. LayerNorm eps, which
changes no parameter, is taken over from it (`resolve_layer_norm_eps`) and stands in the run's config.yaml. Encoders
with biases of query, key and value that are not all zero are refused: the paper's has none, and nor has any published
DINOv3 ViT-S, B or L, whose files hold zeros.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from braindino.pretrain.checkpoint import load_newest_checkpoint
from braindino.pretrain.distillation import Network
from braindino.pretrain.loading_snippet import architecture_name
from braindino.records import read_yaml
from braindino.vision_transformer import VisionTransformer
from braindino.weights import TEACHER_EPS, load_encoder, load_heads

HEADS = ("dino_head", "ibot_head")
_CENTRE = "centre."
# Values of an architecture that do not have to agree: one is only the start of training, the other is taken over.
_FREE = ("layer_scale_init", "layer_norm_eps")
_SETTINGS = {"num_storage_tokens": "--model.num-storage-tokens"}


def resolve_layer_norm_eps(stated: float | None, *, source: Path | None, config_path: Path) -> float:
    """LayerNorm eps of a run's encoder.

    Args:
        stated: setting `model.layer_norm_eps`; goes before everything else.
        source: what the run starts from (`init_from`), None for fresh weights.
        config_path: the run's config.yaml; what it holds is kept on resuming, when `source` may be gone.

    Raises:
        ValueError, FileNotFoundError: nothing at `source`, or nothing that can be started from.
    """
    if stated is not None:
        return stated
    for path in (config_path, *([source / "config.yaml"] if source is not None and is_run(source) else [])):
        recorded = read_yaml(path).get("model", {}).get("layer_norm_eps") if path.is_file() else None
        if recorded is not None:
            return float(recorded)
    if source is None or is_run(source):
        return TEACHER_EPS
    return float(load_encoder(source).architecture["layer_norm_eps"])


def is_run(source: Path) -> bool:
    """Whether a path is the folder of a pretraining run, rather than an encoder."""
    return (source / "checkpoints").is_dir() or (source / "run.json").is_file()


def start_from(student: Network, teacher: Network, source: Path) -> list[str]:
    """Load other weights into student and teacher; what was taken from where, in words.

    Args:
        student: with the parameters of a fresh run; a head that `source` cannot give stays as it is.
        teacher: its copy.
        source: a run, whose teacher (encoder and both heads) is taken; or any encoder that `load_encoder` knows:
            DINOv3 in the official, timm or Hugging Face layout, a BrainDINO or MedDINOv3 teacher file, our own.

    Raises:
        ValueError: the encoder, or a head of a run, has another shape (names what differs and the setting), a file is
            damaged, or the run has no checkpoint.
        FileNotFoundError: there is nothing at `source`.
    """
    return _start_from_run(student, teacher, source) if is_run(source) else _start_from_file(student, teacher, source)


def _start_from_run(student: Network, teacher: Network, run_dir: Path) -> list[str]:
    checkpoint = load_newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(
            f"--init-from {run_dir}: no checkpoint there; give the folder of a run that has one, or {run_dir}/encoder "
            "for its encoder without heads"
        )
    given = checkpoint.state["teacher"]
    weights = {name: tensor for name, tensor in given.items() if not name.startswith(_CENTRE)}
    problem = _difference(student.state_dict(), weights)
    if problem:
        raise ValueError(
            f"--init-from {checkpoint.path}: {problem}; use the same model settings as that run (its config.yaml)"
        )
    student.load_state_dict(weights)
    lines = [f"starting from the teacher of {checkpoint.path}, encoder and heads"]
    centre = {name: tensor for name, tensor in teacher.state_dict().items() if name.startswith(_CENTRE)}
    if centre and not _difference(centre, {name: given[name] for name in centre if name in given}):
        centre = {name: given[name] for name in centre}
    elif centre:
        lines.append("softmax centring starts from zeros: that run had none")
    teacher.load_state_dict({**weights, **centre})
    return lines


def _start_from_file(student: Network, teacher: Network, source: Path) -> list[str]:
    encoder = load_encoder(source)
    _check_architecture(student.encoder, encoder, source)
    lines = [f"starting from the encoder {source} (sha256 of its weights {encoder.sha256[:12]}...)"]
    eps, eps_here = (each.architecture["layer_norm_eps"] for each in (encoder, student.encoder))
    if eps != eps_here:
        lines.append(f"LayerNorm eps is {eps_here:g} as set; the encoder is one of {eps:g}")
    elif eps != TEACHER_EPS:
        lines.append(f"LayerNorm eps {eps:g}, taken over from it")
    heads = load_heads(source)
    for network in (student, teacher):
        network.encoder.load_state_dict(encoder.state_dict())
    for name in HEADS:
        problem = (
            _difference(getattr(student, name).state_dict(), heads[name]) if name in heads else "the file has none"
        )
        if problem:
            lines.append(f"{name}: fresh, since {problem}")
            continue
        for network in (student, teacher):
            getattr(network, name).load_state_dict(heads[name])
        lines.append(f"{name}: from the file")
    return lines


def _check_architecture(expected: VisionTransformer, found: VisionTransformer, source: Path) -> None:
    here, there = expected.architecture, found.architecture
    differing = [key for key in here if key not in _FREE and here[key] != there[key]]
    if not differing:
        return
    problems = "; ".join(f"{key}: found {there[key]}, expected {here[key]}" for key in differing)
    if "qkv_bias" in differing:
        advice = "encoders with biases of query, key and value that are not zero cannot be gone on from"
    elif (name := architecture_name(there)) and name != architecture_name(here):
        advice = f"use --model.architecture {name}"
    elif settings := [f"{_SETTINGS[key]} {there[key]}" for key in differing if key in _SETTINGS]:
        advice = f"use {' '.join(settings)}"
    else:
        advice = "no setting of a run describes such an encoder"
    raise ValueError(f"--init-from {source}: another architecture ({problems}); {advice}")


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """The first of the parameters that do not fit, in words; empty if all do."""
    shapes, shapes_found = ({name: tuple(value.shape) for name, value in each.items()} for each in (expected, found))
    differing = [name for name in {**shapes, **shapes_found} if shapes.get(name) != shapes_found.get(name)]
    if not differing:
        return ""
    name = differing[0]
    return (
        f"{len(differing)} parameters do not fit, first {name}: found {shapes_found.get(name, 'none')}, "
        f"expected {shapes.get(name, 'none')}"
    )
