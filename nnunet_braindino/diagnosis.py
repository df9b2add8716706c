"""What nnU-Net will find here: versions and places of both packages, the start-up hook, the trainers, the encoder."""

import contextlib
import importlib
import io
import json
import os
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from nnunet_braindino import _startup

TRAINER = "nnUNetTrainerBrainDINOFrozen"
VARIABLES = (
    "nnUNet_raw",
    "nnUNet_preprocessed",
    "nnUNet_results",
    _startup.TRAINER_VARIABLE,
    _startup.OPT_OUT_VARIABLE,
)
SUPPORTED = ("2.8",)
"""First two numbers of the nnunetv2 releases whose trainers' contract is known."""


def diagnose() -> tuple[list[str], bool]:
    """Lines on versions, folders, trainers and the encoder with its hash; whether nnU-Net finds the trainer."""
    lines = [describe_package(name) for name in ("nnunetv2", "braindino", "torch")]
    version = _version("nnunetv2")
    if version is not None and ".".join(version.split(".")[:2]) not in SUPPORTED:
        lines.append(f'nnunetv2 {version} has not been tried; pip install "nnunetv2>={SUPPORTED[0]},<2.9"')
    lines.append(_describe_hook())
    lines += [f"{name}={os.environ.get(name, '(not set)')}" for name in VARIABLES]
    trainer, problem = _find_trainer()
    if trainer is None:
        lines.append(f'{TRAINER}: nnU-Net does not find it ({problem}); eval "$(braindino nnunet env)"')
    else:
        from nnunet_braindino.trainer_variants import FULL_TRAINERS, LABEL_RATIOS, SCHEDULES

        lines.append(f"{TRAINER}: nnU-Net finds it in {trainer.__module__}")
        lines.append(
            f"trainers: {', '.join(name.removeprefix('nnUNetTrainer') for name in FULL_TRAINERS)}; each with "
            f"{', '.join(f'_{ratio}' for ratio in LABEL_RATIOS)} and {', '.join(f'_{each}' for each in SCHEDULES)}"
        )
    lines.append(_describe_encoder())
    return lines, trainer is not None


def describe_package(name: str) -> str:
    """Version of an installed package, how it was installed and where its code lies."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return f"{name}: not installed"
    module = importlib.import_module(name)
    place = Path(module.__file__).parent if module.__file__ else Path(next(iter(module.__path__)))
    return f"{name} {found.version}, {'editable' if _is_editable(found) else 'regular'} install, in {place}"


def _is_editable(found: Distribution) -> bool:
    """As pip notes it (PEP 610)."""
    note = found.read_text("direct_url.json")
    return note is not None and bool(json.loads(note).get("dir_info", {}).get("editable"))


def _describe_hook() -> str:
    folders = os.environ.get(_startup.TRAINER_VARIABLE, "").split(os.pathsep)
    if _startup.TRAINER_DIR in folders:
        return f"start-up hook: {_startup.TRAINER_VARIABLE} names our folder"
    if os.environ.get(_startup.OPT_OUT_VARIABLE, "") not in ("", "0"):
        return f"start-up hook: switched off by {_startup.OPT_OUT_VARIABLE}"
    return (
        "start-up hook: it has not run (python -S, or a folder on PYTHONPATH that was not installed into); "
        "pip install braindino into this environment"
    )


def _find_trainer() -> tuple[type | None, str]:
    """What nnU-Net's own search finds, or why nothing; it chats on standard output."""
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    except ImportError as error:
        return None, f"nnU-Net 2.8 cannot be imported: {error}"
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return recursive_find_trainer_class_by_name(TRAINER), ""
        except RuntimeError:
            return None, f"{_startup.TRAINER_VARIABLE} does not lead to it"


def _describe_encoder() -> str:
    from nnunet_braindino.encoder_checkpoint import encoder_from_environment, encoder_identity

    try:
        identity = encoder_identity(encoder_from_environment())
    except (ValueError, OSError) as error:
        return f"encoder: none ({error})"
    return f"encoder: {identity['name']}, sha256 {identity['sha256']}, from {_startup.ENCODER_VARIABLE}"


def _version(package: str) -> str | None:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None
