"""Pictures to look through: every prepared scan as three of its slices, every quarantined one with its reason."""

import hashlib
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.atomic import replace_file
from braindino.manifest import Scan
from braindino.slice_store import SliceStore

SCANS_PER_PAGE = 48
SLICES_PER_SCAN = 3
COLUMNS = 8
# Standard deviations that are black and white in the pictures.
GREY_RANGE = (-2.5, 3.0)

_KEY = "braindino-key"


def draw_montages(montage_dir: Path, store: SliceStore, rows: Sequence[Scan]) -> list[Path]:
    """Draw one page per 48 scans, cohort by cohort, as ``<cohort>_001.png``; the paths of all pages.

    Pages whose content has not changed are left as they are; pages of scans that are gone are removed.

    Args:
        montage_dir: where the pages go.
        store: the slices.
        rows: the scans to show, ordered; ``skipped`` ones are left out.
    """
    slices_of = defaultdict(list)
    for index, scan_index in enumerate(store.scan_index):
        slices_of[store.scans[scan_index].scan_id].append(index)
    shown = [row for row in rows if row.status != "skipped"]
    pages = []
    for cohort, members in groupby(shown, key=lambda row: row.cohort):
        scans = list(members)
        for number, first in enumerate(range(0, len(scans), SCANS_PER_PAGE), start=1):
            tiles = [
                _Tile(scan, _strip(store, slices_of[scan.scan_id]) if scan.status == "done" else None)
                for scan in scans[first : first + SCANS_PER_PAGE]
            ]
            path = montage_dir / f"{_file_name(cohort)}_{number:03d}.png"
            key = _page_key(tiles)
            if _key_of(path) != key:
                _draw_page(path, tiles, title=f"{cohort}, page {number}", key=key)
            pages.append(path)
    for path in set(montage_dir.glob("*.png")) - set(pages):
        path.unlink()
    return pages


class _Tile(NamedTuple):
    """A scan and its picture (rows, columns) in standard deviations; none for a quarantined scan."""

    scan: Scan
    picture: np.ndarray | None


def _strip(store: SliceStore, indices: Sequence[int]) -> np.ndarray:
    """Slices at a quarter, half and three quarters of those stored, side by side, at half size, background black."""
    picked = [indices[len(indices) * part // (SLICES_PER_SCAN + 1)] for part in range(1, SLICES_PER_SCAN + 1)]
    strip = np.hstack([store[index][::2, ::2] for index in picked])
    return np.where(strip == 0, np.float32(GREY_RANGE[0]), strip)


def _draw_page(path: Path, tiles: Sequence[_Tile], *, title: str, key: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(tiles))
    num_rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(1.9 * columns, 0.25 + 0.95 * num_rows), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color="white", fontsize=7)
    for axes, (scan, picture) in zip(figure.subplots(num_rows, columns, squeeze=False).flat, tiles, strict=False):
        label = " ".join(filter(None, [scan.subject, scan.session, scan.sequence]))
        axes.set_title(textwrap.shorten(label, 44, placeholder="..."), color="white", fontsize=5, pad=2)
        if picture is None:
            reason = textwrap.shorten(scan.reason, 150, placeholder="...")
            axes.text(0.5, 0.5, textwrap.fill(reason, 38), color="salmon", fontsize=4.5, ha="center", va="center")
        else:
            axes.imshow(picture, cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1])
    for axes in figure.axes:
        axes.set_axis_off()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="black", metadata={_KEY: key})


def _page_key(tiles: Sequence[_Tile]) -> str:
    """Changes with anything the page shows."""
    digest = hashlib.sha256()
    for scan, picture in tiles:
        digest.update(f"{scan.scan_id} {scan.status} {scan.reason}\n".encode())
        if picture is not None:
            digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def _key_of(path: Path) -> str:
    """What a page drawn earlier says of its content."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get(_KEY, ""))


def _file_name(cohort: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in cohort) or "cohort"
