"""Lets stock nnU-Net find our trainers: adds their folder to ``nnUNet_extTrainer`` when Python starts.

``braindino_nnunet.pth`` (and ``braindino_nnunet.start`` from Python 3.15 on) call :func:`register` at every start, so
only the standard library is used and nothing else happens. ``BRAINDINO_NO_NNUNET_HOOK=1`` switches it off; the same
can then be had with ``eval "$(braindino nnunet env)"``. The names of our environment variables are kept here, too.
"""

import os

TRAINER_VARIABLE = "nnUNet_extTrainer"
OPT_OUT_VARIABLE = "BRAINDINO_NO_NNUNET_HOOK"
ENCODER_VARIABLE = "BRAINDINO_ENCODER"
# String arithmetic rather than pathlib: this runs at every start of every Python in the environment.
TRAINER_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "nnunet_trainers")  # noqa: PTH100, PTH118, PTH120


def register() -> None:
    """Append our trainer folder to ``nnUNet_extTrainer``; the user's own folders stay, and stay first."""
    if os.environ.get(OPT_OUT_VARIABLE, "") not in ("", "0"):
        return
    os.environ[TRAINER_VARIABLE] = extended(os.environ.get(TRAINER_VARIABLE, ""))


def encoder_name() -> str:
    """The encoder that BRAINDINO_ENCODER names, empty where it is not set; the one place where the variable is read."""
    return os.environ.get(ENCODER_VARIABLE, "")


def extended(folders: str) -> str:
    """``folders`` (separated as in PATH) with our trainer folder at the end, once."""
    present = [folder for folder in folders.split(os.pathsep) if folder]
    return os.pathsep.join(present if TRAINER_DIR in present else [*present, TRAINER_DIR])
