"""Collections of the LONI Image and Data Archive: ``PROJECT/SUBJECT/DESCRIPTION/DATE_TIME/IMAGE/...``.

What an image is stands in the name that the scanner's operator gave it. NIfTI files are taken as they are; a folder of
DICOM files is one series, to be converted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.preprocessing.cohort_table import CohortRow
from braindino.preprocessing.conversion import Conversion
from braindino.preprocessing.discovery import Candidate, SourceFolder, convert_to, describe, reason_to_leave
from braindino.preprocessing.naming import ImageName, list_images
from braindino.preprocessing.sequence_rules import MIN_IMAGES, T1_UNDECIDED, classify

# Below the project: subject, description, date and time, identifier of the image, and of NIfTI images the file.
LAYOUT = re.compile(
    r"/(?P<subject>[^/]+)/(?P<description>[^/]+)/(?P<session>\d{4}-\d{2}-\d{2})_\d{2}_\d{2}_\d{2}\.\d+/[SI]?\d+"
    r"(?:/[^/]+\.nii(?:\.gz)?)?\Z",
    re.IGNORECASE,
)
WHY_NOT = {
    "other": "other_format: neither NIfTI nor DICOM",
    "half": "other_format: Analyze, where the row reads NIfTI and DICOM",
    "analyze": "other_format: Analyze, where the row reads NIfTI and DICOM",
}


@dataclass(frozen=True)
class NamedSeries:
    """What a LONI path says of a series, for :func:`braindino.preprocessing.sequence_rules.classify`: its name alone.

    A folder says no modality and no times; collections of magnetic resonance are asked for, and a series of too few
    images is found out when it is read.
    """

    description: str
    modality: str = "MR"
    num_images: int = MIN_IMAGES
    tags: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, int] = ("", 0)


def read_candidates(folders: Sequence[SourceFolder], *, cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """One candidate for every NIfTI file and every folder of DICOM files below the sources; no file is opened."""
    verdicts: dict[str, tuple[str, str]] = {}
    return [
        _read(image, folder, cohort=cohort, out_dir=out_dir, verdicts=verdicts)
        for folder in folders
        for image in list_images(folder.names)
    ]


def _read(
    image: ImageName, folder: SourceFolder, *, cohort: CohortRow, out_dir: Path, verdicts: dict[str, tuple[str, str]]
) -> Candidate:
    path = f"{folder.path}/{image.name}" if image.name else folder.path
    match = next(filter(None, (pattern.search(path) for pattern in (*cohort.patterns, LAYOUT))), None)
    found = match.groupdict() if match else {}
    # LONI writes every character that is no letter or digit as an underscore.
    description = (found.get("description") or "").replace("_", " ").strip()
    if description not in verdicts:
        verdicts[description] = _classify(description, cohort) if match else (UNKNOWN_SEQUENCE, "")
    sequence, by_name = verdicts[description]
    reason = reason_to_leave(path, folder.root, cohort=cohort) or WHY_NOT.get(image.form, "") or by_name
    candidate = describe(path, {**found, "description": description}, cohort=cohort, sequence=sequence, reason=reason)
    if image.form == "dicom" and match:
        candidate = convert_to(out_dir, candidate, Conversion(kind="dicom"), match[0].lstrip("/"))
    return candidate


def _classify(description: str, cohort: CohortRow) -> tuple[str, str]:
    """Sequence and reason to leave of a series of this name.

    Whether contrast agent was given is not told by a name that says nothing of it; these are studies without.
    """
    verdict = classify(NamedSeries(description), cohort.sequence_rules)
    sequence = "T1" if verdict.sequence == T1_UNDECIDED else verdict.sequence
    return sequence or UNKNOWN_SEQUENCE, verdict.skip
