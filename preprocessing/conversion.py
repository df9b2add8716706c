"""A NIfTI scan from a DICOM series, a fastMRI file or an Analyze pair: one file in RAS+ per scan, or a reason why not.

DICOM pixels are read by dcm2niix, which knows the makers' dialects; everything that can be known without it (that all
images are there, belong to one series and lie at even distances) is checked before it runs, since it drops unreadable
images and goes on.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.volume import Volume, VolumeError, load_volume, save_array

# Raised whenever the same input gives another NIfTI than before.
CONVERSION_VERSION = 1
KINDS = ("dicom", "fastmri", "analyze")
# The slowest series met took seconds; an hour-long one is a hanging network disk.
DCM2NIIX_SECONDS = 600
# Localisers have 1 to 5 slices per direction, the thickest clinical stacks (7 mm with gaps) about 16.
MIN_SLICES = 8
# What dcm2niix writes beside the image itself, by the ending of the name.
BY_PRODUCTS = {
    "equalised": re.compile(r"_Eq(_\d+)?$"),
    "tilt-corrected": re.compile(r"_Tilt(_\d+)?$"),
    "cropped": re.compile(r"_Crop(_\d+)?$"),
    "overlay": re.compile(r"_ROI\d*$"),
    "phase": re.compile(r"_(ph|phase|real|imaginary)[a-z]?$"),
}

_MENDED = ("singleton_squeezed", "nonfinite_replaced")
_FULL_DISK_BYTES = 1 << 22
_NAME = re.compile(r"[0-9a-f]{16}\.nii\.gz")
_NOISE = re.compile(
    r"Chris Rorden|Defaults ignored|^Found \d+ DICOM|Patient Position|autoBids|MoCo\?|^Convert|^Conversion"
)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a NIfTI file is made from something else.

    Attributes:
        kind: ``dicom``, ``fastmri`` or ``analyze``.
        files: names of the files that belong to a series that shares its folder with others, whose source is the
            first of them; empty: the source itself, or all files of that folder.
        parameters: plain values by name, sorted; part of what a scan's outcome depends on.
    """

    kind: str
    files: tuple[str, ...] = ()
    parameters: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of conversion: found {self.kind!r}; expected one of {KINDS}")
        outside = [name for name in self.files if Path(name).name != name or name in (".", "..")]
        if outside:
            raise ValueError(f"files of a conversion: found {outside[:3]}; expected names without folders")


class Image(NamedTuple):
    """Voxels (X, Y, Z) on their own axes, their (4, 4) affine to the RAS+ world in mm, and notes."""

    data: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


def converted_name(kind: str, identity: str) -> str:
    """File name of a converted scan, 16 hexadecimal digits and ``.nii.gz``: never text from outside.

    Args:
        kind: ``dicom``, ``fastmri`` or ``analyze``.
        identity: what makes the input unique in its cohort, e.g. the SeriesInstanceUID.
    """
    return hashlib.sha256(f"{kind}\0{identity}".encode()).hexdigest()[:16] + ".nii.gz"


def conversion_version() -> str:
    """Changes with this code and with dcm2niix; part of what a converted scan's outcome depends on."""
    try:
        tool = metadata.version("dcm2niix")
    except metadata.PackageNotFoundError:
        tool = "missing"
    return f"{CONVERSION_VERSION}, dcm2niix {tool}"


def source_files(conversion: Conversion, source: Path) -> list[Path]:
    """The files that the outcome of a conversion depends on, sorted by name; not all need exist.

    Raises:
        VolumeError: code ``unreadable_dicom``: ``source`` is to be a folder of DICOM files and is none.
    """
    if conversion.files:
        # A series that shares its folder with others is known by its first file.
        folder = source if source.is_dir() else source.parent
        return [folder / name for name in sorted(conversion.files)]
    if conversion.kind == "dicom":
        from braindino.preprocessing.dicom_series import list_dicom_files

        return list_dicom_files(source)
    if conversion.kind == "analyze":
        from braindino.preprocessing.analyze import header_beside

        return sorted([source, header_beside(source)])
    return [source]


def convert(conversion: Conversion, source: Path, path: Path) -> tuple[str, ...]:
    """Write the scan at ``source`` to ``path`` as NIfTI in RAS+, atomically; what was mended or assumed, as notes.

    Whole numbers that fit become int16, anything else float32. No text of the source gets into the file.

    Args:
        conversion: what the source is, which files of it belong, with which values.
        source: the folder of a DICOM series (or one of its files, if ``conversion.files`` are named), a fastMRI
            ``.h5``, an Analyze ``.img``.
        path: ``.nii.gz``, as :func:`converted_name` names it.

    Raises:
        VolumeError: the input cannot become one scan: ``unreadable_dicom``, ``missing_slices``, ``irregular_spacing``,
            ``mixed_series``, ``ambiguous_series``, ``too_few_slices``, ``no_image``, ``unreadable``, or what
            :func:`braindino.volume.load_volume` finds.
        OSError: ``path`` or the temporary folder cannot be written, or the disk is full.
        ValueError: dcm2niix is not installed.
    """
    if not _NAME.fullmatch(path.name):
        raise ValueError(f"{path}: expected a name of 16 hexadecimal digits and .nii.gz, see converted_name")
    image = _READERS[conversion.kind](source, conversion.files, dict(conversion.parameters))
    save_array(image.data, image.affine, path, dtype=_storage_type(image.data))
    return image.notes


def _storage_type(data: np.ndarray) -> type[np.generic]:
    """int16 where nothing is lost by it: scanners count in whole numbers, and these files are kept."""
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    # NaN fails every comparison, so an image that holds one stays float32.
    fits = bool((data >= low).all() and (data <= high).all()) and bool((np.rint(data) == data).all())
    return np.int16 if fits else np.float32


def _read_dicom(source: Path, files: tuple[str, ...], parameters: Mapping[str, object]) -> Image:
    from braindino.preprocessing.dicom_series import check_series

    paths = source_files(Conversion(kind="dicom", files=files), source)
    uid, count = parameters.get("series_uid"), parameters.get("num_images")
    checked = check_series(
        source,
        paths,
        series_uid=uid if isinstance(uid, str) else None,
        num_images=count if isinstance(count, int) else 0,
    )
    # dcm2niix reads whatever lies in a folder, so it gets one with nothing else in it, under names that are ours.
    with tempfile.TemporaryDirectory(prefix="braindino-dicom-") as name:
        images, out = Path(name, "images"), Path(name, "out")
        images.mkdir()
        out.mkdir()
        for number, path in enumerate(checked.paths):
            # Path.absolute, since a link is read from where it lies.
            Path(images, f"{number:06d}.dcm").symlink_to(path.absolute())
        _run_dcm2niix(images, out, source, [path.name for path in checked.paths])
        return _only_volume(sorted(out.glob("*.nii")), source, checked.notes)


def _run_dcm2niix(images: Path, out: Path, source: Path, names: list[str]) -> None:
    try:
        import dcm2niix
    except ImportError:
        raise ValueError("DICOM series are read by dcm2niix, which is not installed; pip install dcm2niix") from None
    # -g i and a HOME of its own: no settings of the user's; -b n: no sidecar; -l n: unsigned to signed where it fits;
    # -x i: neither cropped nor rotated; -i n: derived images are for the rule table to judge.
    options = ["-g", "i", "-z", "n", "-b", "n", "-f", "s", "-l", "n", "-x", "i", "-i", "n"]
    environment = {"HOME": str(out), "PATH": os.environ.get("PATH", ""), "TMPDIR": str(out)}
    try:
        run = subprocess.run(
            [dcm2niix.bin, *options, "-o", str(out), str(images)],
            cwd=out,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DCM2NIIX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise VolumeError(
            "unreadable_dicom", f"{source}: dcm2niix was not done after {DCM2NIIX_SECONDS} s; try it by hand"
        ) from None
    if run.returncode != 0:
        if shutil.disk_usage(out).free < _FULL_DISK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out.parent))
        message = _last_useful_line(run.stdout + b"\n" + run.stderr, images, names)
        raise VolumeError("unreadable_dicom", f"{source}: dcm2niix ended with code {run.returncode}: {message}")


def _last_useful_line(output: bytes, images: Path, names: list[str]) -> str:
    lines = [" ".join(line.split()) for line in output.decode("utf-8", errors="replace").splitlines()]
    useful = [line for line in lines if line and not _NOISE.search(line)]
    if not useful:
        return "it said nothing"
    # The files that it saw have names of ours; the user knows others.
    ours = re.compile(re.escape(f"{images}{os.sep}") + r"(\d{6})\.dcm")
    return ours.sub(lambda match: names[int(match[1])], useful[-1])


def _only_volume(paths: list[Path], source: Path, notes: tuple[str, ...]) -> Image:
    """The one scan among what dcm2niix wrote.

    By-products are left out (:data:`BY_PRODUCTS`), then whatever is no volume (2D, 4D), then scouts of fewer than
    :data:`MIN_SLICES` slices. What remains must be one.
    """
    usable: list[tuple[str, Volume]] = []
    left: list[str] = []
    refused: list[VolumeError] = []
    for path in paths:
        name = path.stem
        kind = next((kind for kind, ending in BY_PRODUCTS.items() if ending.search(name)), None)
        if kind is not None:
            left.append(f"{name} ({kind})")
            continue
        try:
            volume = load_volume(path)
        except VolumeError as error:
            refused.append(VolumeError(error.code, error.message.replace(str(path), f"{source}, image {name!r}")))
            left.append(f"{name} ({error.code})")
            continue
        if min(volume.shape) < MIN_SLICES:
            shape = "x".join(map(str, volume.shape))
            message = f"{source}, image {name!r}: {shape} voxels; expected at least {MIN_SLICES} slices: a localiser?"
            refused.append(VolumeError("too_few_slices", message))
            left.append(f"{name} (too_few_slices)")
            continue
        usable.append((name, volume))
    if len(usable) > 1:
        found = ", ".join(f"{name} {'x'.join(map(str, volume.shape))}" for name, volume in usable)
        raise VolumeError(
            "ambiguous_series",
            f"{source}: {len(usable)} volumes in one series ({found}); expected one: several echoes, directions or "
            "repeats; keep the files of one in a folder of their own",
        )
    if not usable:
        if refused:
            raise refused[0]
        raise VolumeError("unreadable_dicom", f"{source}: dcm2niix wrote no image but {left or 'nothing'}")
    volume = usable[0][1]
    if left:
        notes = (*notes, f"left_out={','.join(left)}")
    # Of what was mended while reading; whatever else there is to note, the converted file shows, too.
    mended = (note for note in volume.notes if note.startswith(_MENDED))
    return Image(volume.data, volume.affine, (*notes, *mended))


def _read_fastmri(source: Path, files: tuple[str, ...], parameters: Mapping[str, object]) -> Image:
    from braindino.preprocessing.fastmri import read_reconstruction

    return read_reconstruction(source, parameters)


def _read_analyze(source: Path, files: tuple[str, ...], parameters: Mapping[str, object]) -> Image:
    from braindino.preprocessing.analyze import read_analyze

    return read_analyze(source, parameters)


_READERS: Mapping[str, Callable[[Path, tuple[str, ...], Mapping[str, object]], Image]] = {
    "dicom": _read_dicom,
    "fastmri": _read_fastmri,
    "analyze": _read_analyze,
}
