"""Pictures to look through: every prepared scan as three of its slices, every quarantined one with its reason."""

import hashlib
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

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
            batch = scans[first : first + SCANS_PER_PAGE]
            path = montage_dir / f"{_file_name(cohort)}_{number:03d}.png"
            key = _page_key(batch, store, slices_of)
            if _key_of(path) != key:
                _draw_page(path, key, f"{cohort}, page {number}", batch, store, slices_of)
            pages.append(path)
    for path in set(montage_dir.glob("*.png")) - set(pages):
        path.unlink()
    return pages


def _draw_page(
    path: Path, key: str, title: str, scans: Sequence[Scan], store: SliceStore, slices_of: dict[str, list[int]]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(scans))
    num_rows = -(-len(scans) // columns)
    figure = Figure(figsize=(1.9 * columns, 0.25 + 1.05 * num_rows), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, color="white", fontsize=8)
    for axes, scan in zip(figure.subplots(num_rows, columns, squeeze=False).flat, scans, strict=False):
        label = " ".join(filter(None, [scan.subject, scan.session, scan.sequence]))
        axes.set_title(textwrap.shorten(label, 44, placeholder="…"), color="white", fontsize=5, pad=2)
        if scan.status == "done":
            axes.imshow(_strip(scan, store, slices_of), cmap="gray", vmin=GREY_RANGE[0], vmax=GREY_RANGE[1])
        else:
            axes.text(
                0.5, 0.5, textwrap.fill(scan.reason, 34)[:240], color="salmon", fontsize=4.5, ha="center", va="center"
            )
    for axes in figure.axes:
        axes.set_axis_off()
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, facecolor="black", metadata={_KEY: key})


def _strip(scan: Scan, store: SliceStore, slices_of: dict[str, list[int]]) -> np.ndarray:
    """Slices at a quarter, half and three quarters of those stored, side by side, background black."""
    indices = slices_of[scan.scan_id]
    picked = [indices[len(indices) * part // (SLICES_PER_SCAN + 1)] for part in range(1, SLICES_PER_SCAN + 1)]
    strip = np.hstack([store[index][::2, ::2] for index in picked])
    return np.where(strip == 0, GREY_RANGE[0], strip)


def _page_key(scans: Sequence[Scan], store: SliceStore, slices_of: dict[str, list[int]]) -> str:
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(f"{scan.scan_id} {scan.status} {scan.reason} {scan.num_slices}\n".encode())
        if scan.status == "done":
            digest.update(_strip(scan, store, slices_of).tobytes())
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
