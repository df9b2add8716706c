"""What an encoder has seen of a dataset's test subjects, kept beside the dataset where scoring finds it."""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from braindino.atomic import write_json
from braindino.audit import add_fingerprints
from braindino.leakage import UNKNOWN, Crosswalk, Exposure, check_test_scans
from braindino.manifest import Scan
from braindino.progress import track
from braindino.volume import VolumeError
from nnunet_braindino.raw_dataset import Case

OVERLAP_FILE = "pretraining_overlap.json"


def check_against_pretraining(
    cases: Sequence[Case],
    *,
    channels: Sequence[str],
    test_subjects: Collection[str],
    exposure: Exposure | None,
    model: str,
    crosswalk: Iterable[Path] = (),
    allow_overlap: bool,
) -> str:
    """The stamp for scores on these cases: what of them an encoder has seen.

    The images of the test subjects are compared by voxels, looks and ids; without test subjects those of all, since
    every case is then scored in cross-validation.

    Args:
        cases: of the dataset.
        channels: sequence of each image of a case.
        test_subjects: ``cohort/subject`` keys.
        exposure: what the model was pretrained on; None where nobody wrote it down.
        model: what the exposure belongs to, for messages.
        crosswalk: tables that join ids.
        allow_overlap: stamp an overlap instead of refusing it.

    Raises:
        ValueError: something was pretrained on, and it was not allowed; names it.
    """
    tested = [case for case in cases if not test_subjects or case.subject in set(test_subjects)]
    # Nothing to compare with needs no fingerprints, which take reading every image.
    with_fingerprints = exposure is not None and bool(exposure.scans)
    scans = []
    for case in track(tested, desc="compare with pretraining"):
        cohort, _, subject = case.subject.partition("/")
        for path, channel in zip(case.images, channels, strict=True):
            scan = Scan(str(path), cohort, subject, sequence=channel)
            scans.append(_fingerprinted(scan) if with_fingerprints else scan)
    return check_test_scans(exposure, scans, model=model, allow_overlap=allow_overlap, crosswalk=Crosswalk(crosswalk))


def write_overlap(dataset_dir: Path, *, model: str, stamp: str) -> None:
    """Write the stamp beside the dataset."""
    write_json(dataset_dir / OVERLAP_FILE, {"pretrained_on": model, "pretraining_overlap": stamp})


def read_overlap(dataset_dir: Path) -> str:
    """The stamp of a dataset; ``unknown`` where nobody asked.

    Raises:
        ValueError: the file is damaged.
    """
    path = dataset_dir / OVERLAP_FILE
    if not path.exists():
        return f"{UNKNOWN}: the dataset was converted without --pretrained-on, and BRAINDINO_ENCODER was not set"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["pretraining_overlap"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}); convert the dataset again") from error


def _fingerprinted(scan: Scan) -> Scan:
    """With fingerprints where the file can be read; where it cannot, conversion leaves its case out and says why."""
    try:
        return add_fingerprints(scan)
    except (VolumeError, OSError):
        return scan
