"""Cohorts whose paths say everything: subject, session and sequence are named groups of the row's patterns."""

from collections.abc import Sequence
from pathlib import Path

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.preprocessing.cohort_table import CohortRow
from braindino.preprocessing.conversion import Conversion
from braindino.preprocessing.discovery import Candidate, SourceFolder, convert_to, describe, reason_to_leave
from braindino.preprocessing.naming import ImageName, list_images

WHY_NOT = {
    "dicom": "other_format: DICOM, where the row reads files",
    "other": "other_format: neither NIfTI nor Analyze",
    "half": "incomplete: half of an Analyze pair (.img and .hdr)",
    "analyze": "other_format: Analyze, whose axes the row does not declare",
}


def read_candidates(folders: Sequence[SourceFolder], *, cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """One candidate for every image file below the sources; the DICOM files of a folder count as one."""
    return [
        _read(image, folder, cohort=cohort, out_dir=out_dir)
        for folder in folders
        for image in list_images(folder.names)
    ]


def _read(image: ImageName, folder: SourceFolder, *, cohort: CohortRow, out_dir: Path) -> Candidate:
    path = f"{folder.path}/{image.name}" if image.name else folder.path
    match = next(filter(None, (pattern.search(path) for pattern in cohort.patterns)), None)
    found = match.groupdict() if match else {}
    sequence, reason = _sequence(found, cohort) if match else (UNKNOWN_SEQUENCE, "")
    by_place = reason_to_leave(path, folder.root, cohort=cohort)
    by_form = WHY_NOT.get(image.form, "") if image.form != "analyze" or not cohort.geometry else ""
    candidate = describe(path, found, cohort=cohort, sequence=sequence, reason=by_place or by_form or reason)
    if image.form == "analyze" and match:
        conversion = Conversion(kind="analyze", parameters=cohort.geometry)
        candidate = convert_to(out_dir, candidate, conversion, match[0].lstrip("/"))
    return candidate


def _sequence(found: dict[str, str | None], cohort: CohortRow) -> tuple[str, str]:
    """The sequence that the path states, and why it is left if that is none of ours."""
    text = found.get("sequence")
    if text is None and len(cohort.sequences) == 1:
        return cohort.sequences[0], ""
    if text is None:
        return UNKNOWN_SEQUENCE, "unknown_sequence: the path does not tell it"
    sequence = dict(cohort.sequence_of).get(text.lower())
    if sequence is None:
        known = ", ".join(key for key, _ in cohort.sequence_of)
        return UNKNOWN_SEQUENCE, f"other_modality: {text!r} is none of {known}"
    return sequence, ""
