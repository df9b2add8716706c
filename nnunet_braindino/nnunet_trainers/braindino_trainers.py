"""The only file in the folder that nnU-Net searches: it names the trainers, which live in ``nnunet_braindino.trainer``.

nnU-Net imports every module of an external trainer folder as a top-level module and forgets it afterwards. With this
absolute re-export only the names pass through here, while the classes stay importable and can be pickled.
"""

from nnunet_braindino.trainer import (
    nnUNetTrainerBrainDINOFrozen,
    nnUNetTrainerBrainDINOFrozen_10epochs,
    nnUNetTrainerBrainDINOFrozen_demo,
)

__all__ = [
    "nnUNetTrainerBrainDINOFrozen",
    "nnUNetTrainerBrainDINOFrozen_10epochs",
    "nnUNetTrainerBrainDINOFrozen_demo",
]
