"""The encoders by name, and the one door to them: ``load_volume_encoder``."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from braindino.encoders import bm_mae, brainiac, brainmvp, intensity
from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.brainiac import BrainIAC
from braindino.encoders.brainmvp import BrainMVP
from braindino.encoders.checkpoints import MODALITIES, load_bm_mae, load_brainiac, load_brainmvp
from braindino.encoders.contract import VolumeEncoder
from braindino.encoders.intensity import IntensityFloor
from braindino.encoders.slice_encoder import SlicePreparation
from braindino.encoders.slice_transformer import SliceTransformer
from braindino.encoders.timm_encoder import TimmEncoder, build_timm
from braindino.encoders.uniformer import UniFormer
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer
from braindino.weights import UNTRAINED_PREFIX, UNTRAINED_SEED, load_encoder

TIMM_PREFIX = "timm:"
EXPECTED = (
    "brainmvp:PATH, bm-mae:PATH, brainiac:PATH, timm:NAME, intensity, a file or folder that braindino.load_encoder "
    "knows, or untrained:NAME for random weights (brainmvp, bm-mae, brainiac, timm:NAME, vit_base)"
)

Network = TypeVar("Network", bound=nn.Module)


def load_volume_encoder(
    name_or_path: str | Path, *, device: str | torch.device = "cpu", **options: Any
) -> VolumeEncoder:
    """The frozen encoder: float32, ``eval()``, no gradients, weights checked strictly.

    Args:
        name_or_path: ``brainmvp:PATH``, ``bm-mae:PATH`` and ``brainiac:PATH`` for the files that their authors publish;
            ``timm:NAME`` for a timm model with timm's weights; ``intensity``, the floor without an encoder;
            ``untrained:`` and one of ``brainmvp``, ``bm-mae``, ``brainiac``, ``timm:NAME`` for random weights of seed
            0; everything else goes to ``braindino.load_encoder`` (our files, DINOv3's in every layout, teacher files,
            ``untrained:vit_base``).
        device: of the network.
        options: of the encoder's class: ``fit`` (BrainMVP, BM-MAE, BrainIAC), ``feature`` (BrainIAC, timm),
            ``inner_norm`` (all ViTs but timm's), ``size`` and ``stages`` (BrainMVP), ``num_slices``, ``image_size`` and
            ``intensity`` (slices), ``weights`` (timm: a file instead of timm's own).

    Raises:
        ValueError: an unknown option or value, or what the readers say of a file.
        FileNotFoundError: there is nothing at the path.
    """
    text = str(name_or_path)
    kind, _, rest = text.partition(":")
    if text == intensity.NAME:
        return IntensityFloor(**_checked(text, IntensityFloor, options))
    if kind in _CUBES:
        encoder = _build_cube(kind, _CUBES[kind][1](rest), Path(rest).stem, options)
    elif text.startswith(TIMM_PREFIX):
        encoder = _build_timm(rest, pretrained=True, options=options)
    elif text.startswith(UNTRAINED_PREFIX) and rest in _CUBES:
        encoder = _build_cube(rest, draw_weights(_CUBES[rest][2]), "untrained", options)
    elif text.startswith(UNTRAINED_PREFIX + TIMM_PREFIX):
        encoder = _build_timm(rest.removeprefix(TIMM_PREFIX), pretrained=False, options=options)
    else:
        checked = _checked(text, SliceTransformer, options, extra=_SLICE_OPTIONS)
        encoder = SliceTransformer(_load_slices(name_or_path), **checked)
    if encoder.network is not None:
        encoder.network.to(device)
    return encoder


def draw_weights(build: Callable[[], Network]) -> Network:
    """A network whose random weights are those of seed 0; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return build()


# Name -> the encoder's class, the reader of its published file, an untrained network.
_CUBES: dict[str, tuple[Callable[..., VolumeEncoder], Callable[[str], nn.Module], Callable[[], nn.Module]]] = {
    brainmvp.NAME: (BrainMVP, load_brainmvp, UniFormer),
    bm_mae.NAME: (BMMAE, load_bm_mae, lambda: BMMAETransformer(modalities=MODALITIES)),
    brainiac.NAME: (BrainIAC, load_brainiac, BrainIACTransformer),
}
_SLICE_OPTIONS = tuple(SlicePreparation.__dataclass_fields__)


def _build_cube(kind: str, network: nn.Module, label: str, options: dict[str, Any]) -> VolumeEncoder:
    build = _CUBES[kind][0]
    return build(network, name=f"{kind}-{label}", **_checked(kind, build, options))


def _build_timm(name: str, *, pretrained: bool, options: dict[str, Any]) -> VolumeEncoder:
    checked = _checked(TIMM_PREFIX + name, TimmEncoder, options, extra=(*_SLICE_OPTIONS, "weights"))
    weights = checked.pop("weights", None)
    if weights is not None and not pretrained:
        raise ValueError(f"{UNTRAINED_PREFIX}{TIMM_PREFIX}{name}: weights={weights} contradicts untrained")
    network = draw_weights(lambda: build_timm(name, pretrained=pretrained, weights=weights))
    label = "timm-" + name.replace("/", "-")
    return TimmEncoder(network, name=label if pretrained else f"untrained-{label}", **checked)


def _load_slices(name_or_path: str | Path) -> Any:
    try:
        return load_encoder(name_or_path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Volume encoders are {EXPECTED}") from error
    except ValueError as error:
        if "not a known layout" not in str(error) and "no architecture" not in str(error):
            raise
        raise ValueError(f"{error}. Volume encoders are {EXPECTED}") from error


def _checked(
    name: str, build: Callable[..., Any], options: dict[str, Any], *, extra: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The options, after checking that the encoder has them all."""
    parameters = inspect.signature(build).parameters.values()
    known = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY} - {"name"} | set(extra)
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"{name}: unknown options {', '.join(unknown)}; this encoder has {', '.join(sorted(known))}")
    return options
