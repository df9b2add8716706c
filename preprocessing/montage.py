"""Pictures to look through: every prepared scan as three of its slices, every quarantined one with its reason.

Drawn with Pillow, not with a plotting library: a cohort of 50,000 scans has a thousand pages.
"""

import hashlib
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from braindino.atomic import replace_file
from braindino.manifest import Scan
from braindino.preprocessing.cases import picture_path
from braindino.slice_store import SliceStore

SCANS_PER_PAGE = 48
SLICES_PER_SCAN = 3
COLUMNS = 4
# Standard deviations that are black and white in the pictures.
GREY_RANGE = (-2.5, 3.0)

# Pixels: a slice at half its size, its line of text, the space between tiles, the head of the page.
_SLICE, _LINE, _GAP, _HEAD = 128, 15, 6, 26
_TILE = (SLICES_PER_SCAN * _SLICE, _SLICE + _LINE)
_SALMON, _WHITE = (250, 128, 114), (255, 255, 255)
_REASON_LETTERS = 62
_KEY = "braindino-key"


def draw_montages(montage_dir: Path, store: SliceStore, rows: Sequence[Scan]) -> list[Path]:
    """Draw one page per 48 scans, cohort by cohort, as ``<cohort>_001.png``; the paths of all pages.

    Pages whose content has not changed are left as they are; pages of scans that are gone are removed.

    Args:
        montage_dir: where the pages go, in the prepared folder.
        store: the slices.
        rows: the scans to show, ordered; ``skipped`` ones are left out.
    """
    ends = np.cumsum(store.slices_per_scan)
    row_in_store = {scan.scan_id: row for row, scan in enumerate(store.scans)}
    shown = [row for row in rows if row.status != "skipped"]
    pages = []
    for cohort, members in groupby(shown, key=lambda row: row.cohort):
        scans = list(members)
        for number, first in enumerate(range(0, len(scans), SCANS_PER_PAGE), start=1):
            on_page = scans[first : first + SCANS_PER_PAGE]
            path = montage_dir / f"{_file_name(cohort)}_{number:03d}.png"
            key = _page_key(on_page, store, row_in_store)
            if _key_of(path) != key:
                tiles = [
                    _draw_scan(scan, store, range(ends[row] - store.slices_per_scan[row], ends[row]))
                    if (row := row_in_store.get(scan.scan_id)) is not None and scan.status == "done"
                    else _draw_quarantined(scan, picture_path(montage_dir.parent, scan))
                    for scan in on_page
                ]
                _save_page(path, tiles, title=f"{cohort}, page {number}", key=key)
            pages.append(path)
    for path in set(montage_dir.glob("*.png")) - set(pages):
        path.unlink()
    return pages


def _draw_scan(scan: Scan, store: SliceStore, indices: Sequence[int]) -> Image.Image:
    """Slices at a quarter, half and three quarters of those stored, side by side, at half size, background black."""
    picked = [indices[len(indices) * part // (SLICES_PER_SCAN + 1)] for part in range(1, SLICES_PER_SCAN + 1)]
    strip = np.hstack([store[index][::2, ::2] for index in picked])
    low, high = GREY_RANGE
    grey = np.where(strip == 0, 0, np.clip((strip - low) / (high - low), 0, 1) * 255)
    tile = _labelled(scan)
    tile.paste(Image.fromarray(grey.round().astype(np.uint8)), (0, _LINE))
    return tile


def _draw_quarantined(scan: Scan, picture: Path) -> Image.Image:
    """The scan's picture, if one was made, and why it is not used."""
    tile = _labelled(scan)
    top = _LINE + 2
    if picture.exists():
        with Image.open(picture) as image:
            thumbnail = image.convert("RGB")
        thumbnail.thumbnail((_TILE[0], _SLICE - 3 * _LINE))
        tile.paste(thumbnail, (0, top))
        top += thumbnail.height + 2
    lines = textwrap.wrap(scan.reason, _REASON_LETTERS, max_lines=(_TILE[1] - top) // _LINE, placeholder=" ...")
    ImageDraw.Draw(tile).multiline_text((2, top), "\n".join(lines), fill=_SALMON, font=_font(), spacing=2)
    return tile


def _labelled(scan: Scan) -> Image.Image:
    tile = Image.new("RGB", _TILE)
    label = " ".join(filter(None, [scan.subject, scan.session, scan.sequence]))
    label = textwrap.shorten(label, _REASON_LETTERS, placeholder=" ...")
    ImageDraw.Draw(tile).text((2, 1), label, fill=_WHITE, font=_font())
    return tile


def _save_page(path: Path, tiles: Sequence[Image.Image], *, title: str, key: str) -> None:
    columns = min(COLUMNS, len(tiles))
    num_rows = -(-len(tiles) // columns)
    step_x, step_y = _TILE[0] + _GAP, _TILE[1] + _GAP
    page = Image.new("RGB", (columns * step_x + _GAP, _HEAD + num_rows * step_y))
    ImageDraw.Draw(page).text((_GAP, 5), title, fill=_WHITE, font=_font())
    for place, tile in enumerate(tiles):
        page.paste(tile, (_GAP + place % columns * step_x, _HEAD + place // columns * step_y))
    notes = PngImagePlugin.PngInfo()
    notes.add_text(_KEY, key)
    with replace_file(path) as temporary:
        page.save(temporary, format="PNG", pnginfo=notes)


def _page_key(scans: Sequence[Scan], store: SliceStore, row_in_store: dict[str, int]) -> str:
    """Changes with anything the page shows."""
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(f"{scan.scan_id} {scan.status} {scan.reason}\n".encode())
        row = row_in_store.get(scan.scan_id)
        if row is not None:
            digest.update(np.ascontiguousarray(store.records_of_scan(row)).tobytes())
    return digest.hexdigest()[:16]


def _key_of(path: Path) -> str:
    """What a page drawn earlier says of its content."""
    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get(_KEY, ""))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=11)


def _file_name(cohort: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in cohort) or "cohort"
