"""Cohorts in BIDS, or of files with BIDS names in other folders: the name says subject, session and sequence."""

from collections.abc import Sequence
from pathlib import Path

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.preprocessing.cohort_table import CohortRow
from braindino.preprocessing.discovery import UNRECOGNISED, Candidate, SourceFolder, describe, reason_to_leave
from braindino.preprocessing.naming import ImageName, list_images, read_bids_name

DERIVATIVE = "derivative: below a derivatives folder; give that folder itself as SOURCE to take it"


def read_candidates(folders: Sequence[SourceFolder], *, cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """One candidate for every image file below the sources; the DICOM files of a folder count as one.

    Subjects keep their ``sub-`` and sessions their ``ses-`` unless the row's rules say otherwise. ``out_dir`` is not
    used: BIDS files are read as they are.
    """
    return [_read(image, folder, cohort) for folder in folders for image in list_images(folder.names)]


def _read(image: ImageName, folder: SourceFolder, cohort: CohortRow) -> Candidate:
    path = f"{folder.path}/{image.name}" if image.name else folder.path
    reason = reason_to_leave(path, folder.root, cohort=cohort)
    if not reason and "/derivatives/" in path[len(folder.root) :]:
        reason = DERIVATIVE
    if image.form != "nifti":
        reason = reason or f"other_format: BIDS images are NIfTI, this is {image.form}"
        return describe(path, {}, cohort=cohort, sequence=UNKNOWN_SEQUENCE, reason=reason)
    facts = read_bids_name(image.name)
    if facts is None:
        reason = reason or f"{UNRECOGNISED}: not a BIDS name (sub-01_ses-1_T1w.nii.gz)"
        return describe(path, {}, cohort=cohort, sequence=UNKNOWN_SEQUENCE, reason=reason)
    found = {"subject": facts.subject, "session": facts.session}
    return describe(path, found, cohort=cohort, sequence=facts.sequence, reason=reason or facts.skip)
