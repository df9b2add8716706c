"""Trainers by name: the full ones, and each of them with fewer labels, a shorter schedule, or both.

nnU-Net gives trainers no options, and it names result folders and finds models by the trainer's class. So every variant
is a class of its own, put together when its name is asked for: ``nnUNetTrainerBrainDINO`` + kind + ratio + schedule,
for example ``nnUNetTrainerBrainDINOFrozen_r10`` or ``nnUNetTrainerBrainDINOLinear_r40_10epochs``.
"""

import functools
import re
from collections.abc import Iterable
from typing import Any

from braindino.splits import nested_subsets
from nnunet_braindino.encoder_checkpoint import EncoderCheckpoints
from nnunet_braindino.trainer import (
    nnUNetTrainerBrainDINOFrozen,
    nnUNetTrainerBrainDINOFrozenFixedFusion,
    nnUNetTrainerBrainDINOLinear,
)
from nnunet_braindino.trainer_context import nnUNetTrainerBrainDINOContext
from nnunet_braindino.trainer_finetune import nnUNetTrainerBrainDINOFinetune
from nnunet_braindino.volume_trainer import (
    nnUNetTrainerBMMAEFrozen,
    nnUNetTrainerBrainIACFrozen,
    nnUNetTrainerBrainMVPFrozen,
)

FULL_TRAINERS: dict[str, type[EncoderCheckpoints]] = {
    trainer.__name__: trainer
    for trainer in (
        nnUNetTrainerBrainDINOFrozen,
        nnUNetTrainerBrainDINOFrozenFixedFusion,
        nnUNetTrainerBrainDINOFinetune,
        nnUNetTrainerBrainDINOLinear,
        nnUNetTrainerBrainDINOContext,
        nnUNetTrainerBrainMVPFrozen,
        nnUNetTrainerBMMAEFrozen,
        nnUNetTrainerBrainIACFrozen,
    )
}
# Paper sec. 4.3.1; the sixth ratio, 1.0, is the trainer without a suffix.
LABEL_RATIOS = {"r10": 0.1, "r20": 0.2, "r40": 0.4, "r60": 0.6, "r80": 0.8}
RATIO_SEED = 0

_TIME_POINTS = (
    re.compile(r"(sub-[a-zA-Z0-9]+)_.*"),  # BIDS: sub-01_ses-2
    re.compile(r"(BraTS-[a-zA-Z]+-\d+)-\d+"),  # BraTS from 2023 on: BraTS-GLI-00005-100
)


class FewerLabels(EncoderCheckpoints):
    """Trains on a share of the fold's training subjects; validates on all of its validation cases.

    The shares are nested: each holds the smaller ones, and all time points of its subjects.
    """

    label_ratio: float

    def do_split(self) -> tuple[list[str], list[str]]:
        train, validation = super().do_split()
        kept = choose_cases(train, self.label_ratio)
        self.print_to_log_file(f"BrainDINO: label ratio {self.label_ratio}, {len(kept)} of {len(train)} cases")
        return kept, validation


class TenEpochs(EncoderCheckpoints):
    """Some minutes on two CPU cores with ViT tiny, for small real datasets: 10 epochs of 25 iterations.

    For speed the patches fit a brain of 1 mm voxels more closely and nothing is mirrored in training or prediction. The
    learning rate is about three times higher, since there are so few iterations; at ten times, training on a briefly
    pretrained encoder stayed at "no tumour anywhere".
    """

    epochs = 10
    iterations = 25
    validation_iterations = 4
    learning_rate = 1e-3
    patch_size = (192, 160)
    largest_batch = 8
    mirroring = False


class Demo(TenEpochs):
    """A minute or two on two CPU cores with ViT tiny, for the simulated cohort: 5 epochs of 25 iterations.

    The final validation of the fold is left out: the demonstration scores subjects that were held out altogether.
    """

    epochs = 5
    validation_iterations = 2
    patch_size = (160, 128)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self.print_to_log_file("The demonstration leaves out nnU-Net's final validation.")


SCHEDULES = {"10epochs": TenEpochs, "demo": Demo}


def trainer_names() -> list[str]:
    """Every name that :func:`find_trainer` knows."""
    ratios, schedules = (["", *(f"_{suffix}" for suffix in table)] for table in (LABEL_RATIOS, SCHEDULES))
    return [f"{full}{ratio}{schedule}" for full in FULL_TRAINERS for ratio in ratios for schedule in schedules]


@functools.cache
def find_trainer(name: str) -> type[EncoderCheckpoints] | None:
    """The trainer of this name, always the same class; None where there is no such trainer."""
    if name not in trainer_names():
        return None
    full, *suffixes = name.split("_")
    parts: list[type] = [SCHEDULES[suffix] for suffix in suffixes if suffix in SCHEDULES]
    members: dict[str, Any] = {"__module__": __name__, "__doc__": FULL_TRAINERS[full].__doc__}
    for suffix in suffixes:
        if suffix in LABEL_RATIOS:
            parts.append(FewerLabels)
            members["label_ratio"] = LABEL_RATIOS[suffix]
    return type(name, (*parts, FULL_TRAINERS[full]), members) if parts else FULL_TRAINERS[full]


def __getattr__(name: str) -> type[EncoderCheckpoints]:
    """Variants are attributes of this module, so that they can be imported and pickled like any other class."""
    trainer = find_trainer(name)
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return trainer


def choose_cases(cases: Iterable[str], ratio: float) -> list[str]:
    """All cases of a share of their subjects, in the order given; see ``braindino.splits.nested_subsets``."""
    cases = list(cases)
    subjects = set(nested_subsets(map(subject_of, cases), [ratio], seed=RATIO_SEED)[ratio])
    return [case for case in cases if subject_of(case) in subjects]


def subject_of(case: str) -> str:
    """The subject of a case, where its name also tells a session or time point; otherwise the name itself."""
    for pattern in _TIME_POINTS:
        match = pattern.fullmatch(case)
        if match:
            return match[1]
    return case
