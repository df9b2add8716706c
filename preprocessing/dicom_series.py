"""DICOM series: found by their headers, classified by the rule table, checked before they are converted.

Only headers are read, and of those only the tags named here. How many files are opened per series:

* one, where an NBIA ``metadata.csv`` lists the folder and its number of images is the number of files there;
* up to three (first, middle, last), in folders named as NBIA names files (``1-001.dcm``...), one series each;
* every file, anywhere else, since folders of exported examinations hold several series (and one more per series).

What a sample cannot see is seen by the conversion, which reads the headers of all files of the series it is given.
"""

import csv
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag, Tag

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.preprocessing.cohort_table import CohortRow
from braindino.preprocessing.conversion import Conversion
from braindino.preprocessing.discovery import Candidate, SourceFolder, convert_to, describe, reason_to_leave
from braindino.preprocessing.sequence_rules import Verdict, classify, decide_contrast
from braindino.volume import VolumeError

# What a row of a cohort may ask for and what the rules look at.
TAGS = (
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "Modality", "StudyDate",
    "StudyTime", "SeriesDate", "SeriesTime", "AcquisitionTime", "ContentTime", "SeriesNumber", "InstanceNumber",
    "StudyDescription", "SeriesDescription", "ProtocolName", "SequenceName", "ScanningSequence", "SequenceVariant",
    "ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "InversionTime", "FlipAngle", "EchoNumbers",
    "ContrastBolusAgent", "ContrastBolusStartTime", "ImageType", "BodyPartExamined", "Manufacturer",
    "ManufacturerModelName", "MagneticFieldStrength", "SliceThickness", "SpacingBetweenSlices", "NumberOfFrames",
    "NumberOfTemporalPositions", "DerivationDescription",
)  # fmt: skip
_HEADER_TAGS = (*TAGS, "SharedFunctionalGroupsSequence")
_IDENTITY_TAGS = ("SOPClassUID", "SeriesInstanceUID", "NumberOfFrames")
# Where an enhanced (multi-frame) file keeps what others have at the top.
_ENHANCED = {
    "RepetitionTime": ("MRTimingAndRelatedParametersSequence", "RepetitionTime"),
    "FlipAngle": ("MRTimingAndRelatedParametersSequence", "FlipAngle"),
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "InversionTime": ("MRModifierSequence", "InversionTimes"),
    "SliceThickness": ("PixelMeasuresSequence", "SliceThickness"),
}
_GEOMETRY_TAGS = (
    "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns", "BitsAllocated", "SamplesPerPixel",
    "NumberOfFrames", "ImageOrientationPatient", "ImagePositionPatient", "EchoTime", "ImageType",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
)  # fmt: skip

# A gap of one image is twice the usual distance.
GAP = 1.5
# Positions are rounded by some writers (0.01 mm in 3 mm), never by a twentieth of a slice.
IRREGULAR = 0.05
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"

_NBIA_NAME = re.compile(r"\d+-\d+\.dcm", re.IGNORECASE)
_DICOM_SUFFIX = re.compile(r"\.(dcm|ima|dicom)$", re.IGNORECASE)
_OTHER_SUFFIX = re.compile(
    r"\.(csv|tsv|txt|xml|json|pdf|html?|md|xlsx?|docx?|nii|gz|nrrd|mha|mhd|img|hdr|h5|png|jpe?g|zip|tar|yaml|sh|py|log)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One series in one folder.

    Attributes:
        folder: where it lies, absolute.
        files: names of its files, sorted.
        whole_folder: whether these are all DICOM files of the folder.
        num_images: images, i.e. files or the frames of multi-frame ones.
        expected_images: how many images the cohort's ``metadata.csv`` counts; 0 where there is none.
        tags: DICOM keyword -> text of the header that was read, several values joined with a backslash.
        problem: why it cannot be used, ``code: words``, so that it is quarantined; empty otherwise.
    """

    folder: str
    files: tuple[str, ...]
    whole_folder: bool = True
    num_images: int = 0
    expected_images: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def path(self) -> str:
        """What it is known by: its folder, or its first file where it shares the folder with others."""
        return self.folder if self.whole_folder else f"{self.folder}/{self.files[0]}"

    @property
    def uid(self) -> str:
        return self.tags.get("SeriesInstanceUID", "")

    @property
    def patient(self) -> str:
        return self.tags.get("PatientID", "").strip()

    @property
    def study_uid(self) -> str:
        return self.tags.get("StudyInstanceUID", "")

    @property
    def study_date(self) -> str:
        """ISO date, or empty."""
        try:
            return datetime.strptime(self.tags.get("StudyDate", "").replace(".", ""), "%Y%m%d").date().isoformat()
        except ValueError:
            return ""

    @property
    def description(self) -> str:
        return self.tags.get("SeriesDescription", "").strip()

    @property
    def modality(self) -> str:
        return self.tags.get("Modality", "").strip().upper()

    @property
    def order(self) -> tuple[str, int]:
        """Time and number within the study; empty and 0 where the header has none."""
        times = (self.tags.get(name, "") for name in ("AcquisitionTime", "SeriesTime", "ContentTime"))
        number = self.tags.get("SeriesNumber", "")
        return next(filter(None, times), ""), int(number) if number.lstrip("-").isdecimal() else 0


def read_candidates(folders: Sequence[SourceFolder], *, cohort: CohortRow, out_dir: Path) -> list[Candidate]:
    """One candidate for every series below the sources, with its reason where it is left.

    A series that lies in a folder of its own is known by the folder, one among others by its first file.
    """
    found = list(find_series(folders))
    repeated = _copies(series for series, _ in found)
    verdicts = _verdicts([series for series, _ in found], cohort)
    sessions = _sessions([series for series, _ in found])
    candidates = []
    for (series, root), verdict, session in zip(found, verdicts, sessions, strict=True):
        reason = reason_to_leave(series.path, root, cohort=cohort)
        if not series.problem:
            reason = reason or verdict.skip or repeated.get(series.path, "")
        match = next(filter(None, (pattern.search(series.folder) for pattern in cohort.patterns)), None)
        by_path = {name: text for name, text in (match.groupdict() if match else {}).items() if text}
        facts = {"subject": series.patient, "session": session, "description": series.description, **by_path}
        sequence = verdict.sequence or UNKNOWN_SEQUENCE
        candidate = describe(
            series.path, facts, cohort=cohort, sequence=sequence, reason=reason, problem=series.problem
        )
        conversion = Conversion(
            kind="dicom",
            files=() if series.whole_folder else series.files,
            parameters=(("num_images", series.expected_images), ("series_uid", series.uid)),
        )
        candidates.append(convert_to(out_dir, candidate, conversion, series.uid or series.path))
    return candidates


def find_series(folders: Iterable[SourceFolder]) -> Iterator[tuple[Series, str]]:
    """Every series of the folders, with the source it was found under; see the module for how much is read.

    Files that should be DICOM and cannot be read are a series of their own, with the problem ``unreadable_dicom``.
    """
    listed: dict[str, tuple[str, int]] = {}
    for folder in folders:
        if "metadata.csv" in folder.names:
            listed.update(_read_metadata(folder.path))
        names = dicom_names(folder.path, folder.names)
        if names:
            yield from (
                (series, folder.root) for series in _series_of(folder.path, names, listed.get(_path_key(folder.path)))
            )


def dicom_names(folder: str, names: Iterable[str]) -> list[str]:
    """The names in ``folder`` that are DICOM by their suffix, or, without a telling one, by their first bytes."""
    found = []
    for name in names:
        if name.startswith(".") or name.upper() == "DICOMDIR" or _OTHER_SUFFIX.search(name):
            continue
        if _DICOM_SUFFIX.search(name) or _is_dicom(Path(folder, name)):
            found.append(name)
    return sorted(found)


def list_dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in ``folder``, not below it, sorted.

    Raises:
        VolumeError: code ``unreadable_dicom``: there is no such folder, or none in it.
    """
    try:
        names = dicom_names(str(folder), [entry.name for entry in folder.iterdir() if entry.is_file()])
    except OSError as error:
        raise VolumeError("unreadable_dicom", f"{folder}: {error.strerror or error}") from error
    if not names:
        raise VolumeError("unreadable_dicom", f"{folder}: holds no DICOM file")
    return [folder / name for name in names]


class CheckedSeries(NamedTuple):
    """The files to convert, each image once, and what was noticed."""

    paths: list[Path]
    notes: tuple[str, ...]


def check_series(
    source: Path, paths: Sequence[Path], *, series_uid: str | None = None, num_images: int = 0
) -> CheckedSeries:
    """The files of a series after a look at all their headers.

    Args:
        source: what to call it in messages.
        paths: its files.
        series_uid: which series it must be.
        num_images: how many images there must be; 0: nobody has counted them.

    Raises:
        VolumeError: ``unreadable_dicom`` (a header cannot be read, or a file is cut short), ``mixed_series`` (files of
            another series), ``no_image`` (nothing with pixels), ``missing_slices`` (fewer images than were counted, or
            a gap of whole slices) or ``irregular_spacing``.
    """
    headers = [_read_geometry(source, path) for path in paths]
    uids = Counter(header.series_uid for header in headers)
    if len(uids) > 1 or (series_uid and series_uid not in uids):
        found = ", ".join(f"{uid} ({count} files)" for uid, count in uids.most_common(3))
        raise VolumeError(
            "mixed_series", f"{source}: found {found}; expected the one series {series_uid or ''}".rstrip()
        )
    kept: dict[str, _Geometry] = {}
    for header in headers:
        kept.setdefault(header.instance_uid or str(header.path), header)
    notes = [f"repeated_images={len(headers) - len(kept)}"] if len(kept) < len(headers) else []
    images = sum(len(header.frames) for header in kept.values())
    if images < num_images:
        raise VolumeError(
            "missing_slices",
            f"{source}: {images} images; expected the {num_images} that metadata.csv counts: download it again",
        )
    _check_distances(source, [frame for header in kept.values() for frame in header.frames])
    return CheckedSeries([header.path for header in kept.values()], tuple(notes))


class _Frame(NamedTuple):
    """Where an image lies: (6,) direction cosines, (3,) corner, in mm and DICOM's frame; and its kind."""

    orientation: np.ndarray | None
    position: np.ndarray | None
    kind: tuple[str, ...]


class _Geometry(NamedTuple):
    path: Path
    series_uid: str
    instance_uid: str
    frames: list[_Frame]


def _read_geometry(source: Path, path: Path) -> _Geometry:
    header, header_bytes = _read_header_and_size(path, _GEOMETRY_TAGS)
    if isinstance(header, str):
        raise VolumeError("unreadable_dicom", f"{source}: {path.name}: {header}; copy it again")
    sizes = [_number(header, name) for name in ("Rows", "Columns", "BitsAllocated")]
    if not all(sizes):
        raise VolumeError(
            "no_image", f"{source}: {path.name} has no pixels, or lost its header's end; expected an image"
        )
    num_frames = int(_number(header, "NumberOfFrames") or 1)
    if not header.file_meta.TransferSyntaxUID.is_compressed:
        samples = int(_number(header, "SamplesPerPixel") or 1) * num_frames
        needed = header_bytes + int(np.prod([size or 0 for size in sizes])) // 8 * samples
        found = path.stat().st_size
        if found < needed:
            raise VolumeError(
                "unreadable_dicom",
                f"{source}: {path.name} is cut short: {found} bytes; its header and pixels need {needed}; copy it",
            )
    return _Geometry(path, _text(header, "SeriesInstanceUID"), _text(header, "SOPInstanceUID"), list(_frames(header)))


def _frames(header: Dataset) -> Iterator[_Frame]:
    image_type, echo = _text(header, "ImageType"), _text(header, "EchoTime")
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if not per_frame:
        orientation = _vector(header, "ImageOrientationPatient", 6)
        yield _Frame(orientation, _vector(header, "ImagePositionPatient", 3), (echo, image_type))
        return
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    for item in per_frame:
        plane = _first(item, "PlaneOrientationSequence") or _first(shared[0], "PlaneOrientationSequence") or Dataset()
        place = _first(item, "PlanePositionSequence") or Dataset()
        kind = _text(_first(item, "MREchoSequence") or Dataset(), "EffectiveEchoTime")
        frame_type = _text(_first(item, "MRImageFrameTypeSequence") or Dataset(), "FrameType")
        orientation = _vector(plane, "ImageOrientationPatient", 6)
        yield _Frame(orientation, _vector(place, "ImagePositionPatient", 3), (kind, frame_type))


def _check_distances(source: Path, frames: Iterable[_Frame]) -> None:
    """Raise if the slices of one direction and kind have gaps or lie unevenly."""
    stacks: dict[tuple, list[float]] = defaultdict(list)
    for frame in frames:
        if frame.orientation is None or frame.position is None:
            continue  # dcm2niix knows older and private forms of geometry, and refuses files without any
        normal = np.cross(frame.orientation[:3], frame.orientation[3:])
        key = (*np.round(frame.orientation, 2).tolist(), *frame.kind)
        stacks[key].append(float(normal @ frame.position))
    for places in stacks.values():
        # Images at one place are several volumes; what these are is for the conversion to say.
        distinct = np.unique(np.round(places, 3))
        if len(distinct) < 3:
            continue
        steps = np.diff(distinct)
        usual = float(np.median(steps))
        widest, deviation = float(steps.max()), float(np.abs(steps - usual).max())
        if widest > GAP * usual and np.count_nonzero(steps > GAP * usual) * 4 <= len(steps):
            missing = int(np.rint(steps[steps > GAP * usual] / usual).sum()) - np.count_nonzero(steps > GAP * usual)
            raise VolumeError(
                "missing_slices",
                f"{source}: {len(distinct)} slices {usual:.2f} mm apart and a gap of {widest:.2f} mm: about {missing} "
                "missing; download it again",
            )
        if deviation > max(IRREGULAR * usual, 2e-3):
            raise VolumeError(
                "irregular_spacing",
                f"{source}: {len(distinct)} slices {float(steps.min()):.2f} to {widest:.2f} mm apart; expected even "
                "distances, which a volume needs",
            )


def _series_of(folder: str, names: Sequence[str], listed: tuple[str, int] | None) -> Iterator[Series]:
    uid, count = listed or ("", 0)
    if listed and count == len(names):
        chosen: Sequence[str] = names[:1]
    elif listed or all(map(_NBIA_NAME.fullmatch, names)):
        chosen = sorted({names[0], names[len(names) // 2], names[-1]})
    else:
        chosen = names
    reader = _FolderReader(folder)
    uids = {file.series_uid for name in chosen if not isinstance(file := reader.identity(name), str)}
    if len(chosen) < len(names) and (len(uids) != 1 or (uid and uids != {uid})):
        chosen = names
    by_uid: dict[str, list[str]] = defaultdict(list)
    unreadable: list[str] = []
    for name in chosen:
        file = reader.identity(name)
        if isinstance(file, str):
            unreadable.append(name)
        elif file.object_class != DICOMDIR_CLASS:
            by_uid[file.series_uid].append(name)
    # In a folder with one series, a file that cannot be read is one of it; the conversion will say which.
    alone = len(by_uid) == 1
    for series_uid, files in by_uid.items():
        members = names if alone else files
        frames = {name: reader.num_frames(name) for name in files}
        tags = reader.tags(files[0])
        yield Series(
            folder=folder,
            files=tuple(members),
            whole_folder=alone,
            num_images=len(names) * frames[files[0]] if len(chosen) < len(names) else sum(frames.values()),
            expected_images=count if series_uid == uid else 0,
            tags=tags,
            problem="" if series_uid else "unreadable_dicom: no SeriesInstanceUID in the header",
        )
    if unreadable and not alone:
        first = f"{unreadable[0]}: {reader.identity(unreadable[0])}"
        words = f"{len(unreadable)} files that belong to no series, the first {first}; copy them again"
        yield Series(
            folder=folder, files=tuple(unreadable), whole_folder=not by_uid, problem=f"unreadable_dicom: {words}"
        )


class _File(NamedTuple):
    """What a file belongs to."""

    object_class: str
    series_uid: str
    num_frames: int


class _FolderReader:
    """Headers of the files of one folder: of the first all tags, of others only what tells their series."""

    def __init__(self, folder: str):
        self._folder = folder
        self._files: dict[str, _File | str] = {}
        self._tags: dict[str, dict[str, str]] = {}

    def identity(self, name: str) -> _File | str:
        """What a file belongs to, or why it cannot be read."""
        if name not in self._files:
            full = not self._files
            header = _read_header(Path(self._folder, name), _HEADER_TAGS if full else _IDENTITY_TAGS)
            if isinstance(header, str):
                self._files[name] = header
            else:
                frames = int(_number(header, "NumberOfFrames") or 1)
                self._files[name] = _File(_text(header, "SOPClassUID"), _text(header, "SeriesInstanceUID"), frames)
                if full:
                    self._tags[name] = header_tags(header)
        return self._files[name]

    def num_frames(self, name: str) -> int:
        file = self.identity(name)
        return 0 if isinstance(file, str) else file.num_frames

    def tags(self, name: str) -> dict[str, str]:
        """All tags of a file that could be read before."""
        if name not in self._tags:
            header = _read_header(Path(self._folder, name), _HEADER_TAGS)
            self._tags[name] = {} if isinstance(header, str) else header_tags(header)
        return self._tags[name]


def header_tags(header: Dataset) -> dict[str, str]:
    """The values of :data:`TAGS` as text; those of enhanced files from where they keep them."""
    tags = {name: text for name in TAGS if (text := _text(header, name))}
    shared = _first(header, "SharedFunctionalGroupsSequence")
    for name, (group, inner) in _ENHANCED.items():
        item = _first(shared, group) if shared is not None else None
        if name not in tags and item is not None and (text := _text(item, inner)):
            tags[name] = text
    return tags


def _verdicts(found: Sequence[Series], cohort: CohortRow) -> list[Verdict]:
    """What each series is, with contrast decided within its study."""
    verdicts = [classify(series, cohort.sequence_rules) for series in found]
    studies: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, series in enumerate(found):
        studies[series.patient, series.study_uid].append(index)
    for members in studies.values():
        decided = decide_contrast([(found[index], verdicts[index]) for index in members])
        for index, verdict in zip(members, decided, strict=True):
            verdicts[index] = verdict
    return verdicts


def _sessions(found: Sequence[Series]) -> list[str]:
    """The date of each study; several of one patient on one day are numbered in their order."""
    days: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for series in found:
        days[series.patient, series.study_date].add((series.tags.get("StudyTime", ""), series.study_uid))
    # The same study with two times is one study.
    numbers: dict[tuple[str, str], dict[str, int]] = {}
    for day, studies in days.items():
        ordered = list(dict.fromkeys(uid for _, uid in sorted(studies)))
        numbers[day] = {uid: number for number, uid in enumerate(ordered, start=1)} if len(ordered) > 1 else {}
    sessions = []
    for series in found:
        number = numbers[series.patient, series.study_date].get(series.study_uid)
        sessions.append("-".join(filter(None, [series.study_date, f"study{number}" if number else ""])))
    return sessions


def _copies(found: Iterable[Series]) -> dict[str, str]:
    """Path of a series -> why it is left, for those whose images lie in another folder, too."""
    by_uid: dict[str, list[Series]] = defaultdict(list)
    for series in found:
        if series.uid and not series.problem:
            by_uid[series.uid].append(series)
    reasons = {}
    for group in by_uid.values():
        most = max(group, key=lambda series: series.num_images)
        for series in group:
            if series is most:
                continue
            words = f"{series.num_images} images of the series that has {most.num_images} in {most.folder}"
            reasons[series.path] = f"duplicate_series: {words}"
    return reasons


def _read_metadata(folder: str) -> dict[str, tuple[str, int]]:
    """Of NBIA's ``metadata.csv``: key of a series' folder -> its SeriesInstanceUID and number of images.

    The table is only compared with what is found; a path in it opens nothing.
    """
    path = Path(folder, "metadata.csv")
    listed = {}
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as handle:
            for row in csv.DictReader(handle):
                location, uid, count = (row.get(name) for name in ("File Location", "Series UID", "Number of Images"))
                if location and uid and (count or "").strip().isdecimal():
                    # NBIA writes .\COLLECTION\... on Windows and ./COLLECTION/... elsewhere.
                    parts = [part for part in PureWindowsPath(location).parts if part != "."]
                    listed[_path_key(str(Path(folder, *parts)))] = (uid.strip(), int(count or 0))
    except (OSError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); expected NBIA's table, or no file of that name") from error
    return listed


def _path_key(path: str) -> str:
    return path.rstrip("/").casefold()


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_header(path: Path, tags: Sequence[str]) -> Dataset | str:
    """The named tags of a file, or why it cannot be read."""
    return _read_header_and_size(path, tags)[0]


def _read_header_and_size(path: Path, tags: Sequence[str]) -> tuple[Dataset | str, int]:
    """The named tags of a file, or why it cannot be read; and the bytes before the pixel data."""
    try:
        with warnings.catch_warnings(), path.open("rb") as handle:
            # Odd values are common and harmless here; they would be told once per file.
            warnings.simplefilter("ignore", UserWarning)
            header = pydicom.dcmread(handle, stop_before_pixels=True, specific_tags=list(tags))
            # Values are decoded, and kept, when they are asked for first.
            _ = [_text(header, element.keyword) for element in header], header.file_meta.TransferSyntaxUID
            return header, handle.tell()
    except Exception as error:  # a damaged header may raise anything; whatever it is, it is told
        return f"{type(error).__name__}: {' '.join(str(error).split())}", 0


def _text(header: Dataset, name: str) -> str:
    # By number: looking up a keyword that is not there takes pydicom most of its time.
    tag = _tag_of(name)
    if tag not in header:
        return ""
    try:
        value = header[tag].value
    except ValueError:  # a number that is none, say: as good as missing
        return ""
    if value is None:
        return ""
    if isinstance(value, (pydicom.multival.MultiValue, list, tuple)):
        return "\\".join(str(item).strip() for item in value)
    return str(value).strip("\0 ")


@cache
def _tag_of(name: str) -> BaseTag:
    return Tag(name)


def _number(header: Dataset, name: str) -> float | None:
    try:
        return float(_text(header, name))
    except ValueError:
        return None


def _vector(header: Dataset, name: str, length: int) -> np.ndarray | None:
    try:
        values = np.array([float(part) for part in _text(header, name).split("\\")])
    except ValueError:
        return None
    return values if len(values) == length and np.isfinite(values).all() else None


def _first(header: Dataset, name: str) -> Dataset | None:
    tag = _tag_of(name)
    items = header[tag].value if tag in header else None
    return items[0] if items else None
