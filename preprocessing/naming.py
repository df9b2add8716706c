"""What a file's name and folders say about a scan: subject, session, sequence, or that it is no scan at all.

Two conventions are read. BIDS names (``sub-01_ses-2_ce-gadolinium_T1w.nii.gz``) say everything in entities and a
suffix. Any other name is split into tokens at ``-``, ``_`` and ``.``, and only whole tokens count: ``t1`` is in
``patient-t1.nii.gz`` but not in ``chart12.nii.gz``. What the name does not tell stays ``unknown``; nothing is
guessed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import NamedTuple

from braindino.manifest import UNKNOWN_SEQUENCE

# Whole tokens of a name, lower case, to the sequence they stand for.
SEQUENCE_OF_TOKEN = {
    **dict.fromkeys(("t1", "t1n", "t1w", "mprage"), "T1"),
    **dict.fromkeys(("t1c", "t1ce", "t1gd", "t1post"), "T1c"),
    **dict.fromkeys(("t2", "t2w"), "T2"),
    **dict.fromkeys(("fla", "flair", "t2f"), "FLAIR"),
}
CONTRAST_AGENT_TOKENS = frozenset({"ce", "gd", "gad", "gadolinium"})
LABEL_TOKENS = frozenset(
    {
        "mask", "masks", "brainmask", "seg", "dseg", "probseg", "aseg", "aparc", "parc", "segmentation",
        "segmentations", "label", "labels", "labelmap", "tissue", "tissues", "pve", "roi",
    }
)  # fmt: skip
OTHER_MODALITY_TOKENS = frozenset(
    {
        "dwi", "dti", "adc", "trace", "fa", "md", "bold", "fmri", "rest", "func", "perf", "perfusion",
        "dsc", "dce", "asl", "pwi", "cbf", "cbv", "swi", "swan", "mra", "tof", "angio", "pd", "pdw", "t2s",
        "t2star", "t2starw", "t1map", "t2map", "ct", "pet", "phase", "magnitude", "fieldmap", "fmap", "epi",
        "sbref", "localizer", "localiser", "scout", "survey",
    }
)  # fmt: skip
SEQUENCE_OF_BIDS_SUFFIX = {"T1w": "T1", "T2w": "T2", "FLAIR": "FLAIR"}
HIDDEN = "hidden_file: its name or a folder's starts with a dot"
BIDS_LABEL_SUFFIXES = frozenset({"mask", "dseg", "probseg"})

# Formats that hold images and that no reader of files takes; one in a cohort's folders gets a row that says so.
OTHER_FORMATS = (
    ".mgz", ".mgh", ".nrrd", ".nhdr", ".mha", ".mhd", ".mnc", ".mnc.gz", ".h5", ".hdf5", ".par", ".img.gz", ".hdr.gz",
)  # fmt: skip
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")

_NIFTI = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
# A suffix of digits is none of BIDS but a channel of nnU-Net, whose cases may be called as in BIDS.
_BIDS_NAME = re.compile(r"sub-[A-Za-z0-9+]+(?:_[A-Za-z]+-[A-Za-z0-9+.]+)*_(?P<suffix>[A-Za-z][A-Za-z0-9]*)")
_SEPARATORS = re.compile(r"[-_.\s]+")


@dataclass(frozen=True, kw_only=True)
class NameFacts:
    """What the path of one file says.

    Attributes:
        subject: identifier within its cohort.
        session: visit, empty where the path does not tell.
        sequence: ``T1``, ``T1c``, ``T2``, ``FLAIR`` or ``unknown``.
        skip: why the file is not a scan to prepare (``code: words``); empty for scans.
    """

    subject: str
    session: str = ""
    sequence: str = UNKNOWN_SEQUENCE
    skip: str = ""


def is_nifti_name(name: str) -> bool:
    """Whether ``name`` ends like a NIfTI file, in any case: it then gets a row, whatever is inside."""
    return _NIFTI.search(name) is not None


def nifti_stem(name: str) -> str:
    """``name`` without ``.nii`` or ``.nii.gz``."""
    return _NIFTI.sub("", name)


class ImageName(NamedTuple):
    """What looks like an image among the names of a folder.

    Attributes:
        name: of the file; of an Analyze pair the ``.img``; empty for a DICOM series, which is the folder.
        form: ``nifti``, ``analyze``, ``half`` (of an Analyze pair), ``dicom`` or ``other``.
    """

    name: str
    form: str


def list_images(names: Sequence[str]) -> list[ImageName]:
    """The images among the file names of one folder, each once; DICOM files (by their suffix) are one together."""
    images = []
    pairs: dict[str, list[str]] = {}
    has_dicom = False
    for name in names:
        lower = name.lower()
        if lower.endswith((".nii.gz", ".nii")):
            images.append(ImageName(name, "nifti"))
        elif lower.endswith((".img", ".hdr")):
            pairs.setdefault(name[:-4], []).append(name)
        elif lower.endswith(DICOM_SUFFIXES):
            has_dicom = True
        elif lower.endswith(OTHER_FORMATS):
            images.append(ImageName(name, "other"))
    for pair in pairs.values():
        image = next((name for name in pair if name.lower().endswith(".img")), pair[0])
        images.append(ImageName(image, "analyze" if len(pair) == 2 else "half"))
    if has_dicom:
        images.append(ImageName("", "dicom"))
    return images


def read_bids_name(name: str) -> NameFacts | None:
    """The facts in the BIDS name of a NIfTI file; None where it is no BIDS name."""
    stem = nifti_stem(name)
    bids = _BIDS_NAME.fullmatch(stem)
    return _read_bids(stem, bids["suffix"]) if bids else None


def read_name(
    relative_path: PurePath, *, source_name: str, subject_pattern: re.Pattern[str] | None = None, sequence: str = ""
) -> NameFacts:
    """The facts that ``relative_path`` states.

    Args:
        relative_path: path of the file below the source folder.
        source_name: name of the source folder: the subject of a file called just ``T1.nii.gz`` at its top.
        subject_pattern: searched in ``relative_path`` (with ``/``); its groups ``subject``, ``session``,
            ``sequence`` override.
        sequence: the sequence of files whose name does not tell.

    Raises:
        ValueError: ``subject_pattern`` does not match a file that would be prepared, or its ``sequence`` group is
            not a sequence.
    """
    facts = read_bids_name(relative_path.name) or _read_free(relative_path, source_name)
    if any(part.startswith(".") for part in relative_path.parts):
        facts = replace(facts, skip=HIDDEN)
    elif "derivatives" in relative_path.parts[:-1]:
        facts = replace(
            facts, skip="derivative: below a derivatives folder; give that folder itself as SOURCE to take it"
        )
    if facts.skip:
        return facts
    if subject_pattern is not None:
        facts = _apply_pattern(facts, subject_pattern, relative_path)
    if sequence and facts.sequence == UNKNOWN_SEQUENCE:
        facts = replace(facts, sequence=sequence)
    return facts


def _read_bids(stem: str, suffix: str) -> NameFacts:
    entities = dict(part.split("-", 1) for part in stem.split("_")[:-1])
    subject, session = "sub-" + entities["sub"], f"ses-{entities['ses']}" if "ses" in entities else ""
    sequence = SEQUENCE_OF_BIDS_SUFFIX.get(suffix, UNKNOWN_SEQUENCE)
    if sequence == "T1" and "ce" in entities:
        sequence = "T1c"
    skip = ""
    if suffix in BIDS_LABEL_SUFFIXES:
        skip = f"label: BIDS suffix {suffix!r}"
    elif sequence == UNKNOWN_SEQUENCE:
        # In BIDS the suffix says exactly what a file is, so another suffix is another kind of image.
        skip = f"other_modality: BIDS suffix {suffix!r}"
    return NameFacts(subject=subject, session=session, sequence=sequence, skip=skip)


def _read_free(relative_path: PurePath, source_name: str) -> NameFacts:
    stem = nifti_stem(relative_path.name)
    tokens = [token.lower() for token in _SEPARATORS.split(stem) if token]
    sequence = _sequence_of(tokens)
    rest = _without_sequence(stem)
    folders = relative_path.parts[:-1]
    # A folder named like the file less its sequence is the subject's; otherwise the first folder is.
    subject = next(iter(folders), source_name) if not rest or (folders and rest not in folders) else rest
    skip = ""
    if labels := LABEL_TOKENS.intersection(tokens):
        skip = f"label: {min(labels)!r} in the file name"
    elif sequence == UNKNOWN_SEQUENCE and (others := OTHER_MODALITY_TOKENS.intersection(tokens)):
        skip = f"other_modality: {min(others)!r} in the file name"
    return NameFacts(subject=subject, sequence=sequence, skip=skip)


def _sequence_of(tokens: list[str]) -> str:
    found = {SEQUENCE_OF_TOKEN[token] for token in tokens if token in SEQUENCE_OF_TOKEN}
    if found == {"T2", "FLAIR"}:  # "T2_FLAIR" is how scanners call FLAIR
        return "FLAIR"
    if found == {"T1"} and CONTRAST_AGENT_TOKENS.intersection(tokens) and "pre" not in tokens:
        return "T1c"
    return found.pop() if len(found) == 1 else UNKNOWN_SEQUENCE


def _without_sequence(stem: str) -> str:
    """``stem`` less its sequence tokens: ``BraTS-GLI-00001-000-t1n`` gives ``BraTS-GLI-00001-000``."""
    pieces = re.split(r"([-_.\s]+)", stem)
    kept = ""
    for position in range(0, len(pieces), 2):
        if pieces[position].lower() not in SEQUENCE_OF_TOKEN:
            kept += (pieces[position - 1] if kept and position else "") + pieces[position]
    return kept


def _apply_pattern(facts: NameFacts, pattern: re.Pattern[str], relative_path: PurePath) -> NameFacts:
    match = pattern.search(relative_path.as_posix())
    if match is None:
        raise ValueError(
            f"--subject-pattern {pattern.pattern!r} does not match {relative_path.as_posix()!r}; "
            "widen the pattern, or give a SOURCE that leaves this file out"
        )
    groups = {name: value for name, value in match.groupdict().items() if value}
    if "subject" not in groups:
        raise ValueError(
            f"--subject-pattern {pattern.pattern!r}: group 'subject' is empty for {relative_path.as_posix()!r}"
        )
    found = groups.get("sequence")
    if found:
        groups["sequence"] = _sequence_of([found.lower()])
        if groups["sequence"] == UNKNOWN_SEQUENCE:
            raise ValueError(
                f"--subject-pattern {pattern.pattern!r}: group 'sequence' is {found!r} for "
                f"{relative_path.as_posix()!r}; expected one of {', '.join(sorted(SEQUENCE_OF_TOKEN))}"
            )
    return replace(facts, **groups)
