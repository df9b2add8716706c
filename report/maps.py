"""The section of similarity and PCA maps: one slice, three reference patches, the encoder beside itself untrained."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from braindino import patch_maps
from braindino.manifest import Scan, load_brain, read_scans
from braindino.report import figures
from braindino.report.markup import Html, drawing, element, figure, picture
from braindino.report.sections import Content, make_content
from braindino.slices import axial_slices
from braindino.transforms import standardize
from braindino.vision_transformer import VisionTransformer
from braindino.volume import load_labels
from braindino.weights import ENCODER_FILE, UNTRAINED_PREFIX, load_encoder

MIDDLE_SLICE = 128
FIRST_RULE = {
    "tumour": "the one that holds most tumour (of equals, the nearest to its centre)",
    "centre": "the one nearest to the middle of the slice",
}
SEQUENCE_ORDER = ("T1c", "T1", "T2", "FLAIR")


def maps_section(root: Path) -> Content:
    """Similarity and PCA maps of one slice (paper sec. 4.6), of the pretrained encoder and of its like untrained."""
    weights, table_path = root / "pretrain" / "encoder" / ENCODER_FILE, root / "prepared" / "scans.tsv"
    if not weights.is_file() or not table_path.is_file():
        return Content(None, "No pretrained encoder with prepared scans here, so patch-similarity maps are not shown.")
    scan, label_path = _scan_to_look_at(root, read_scans(table_path))
    if scan is None:
        return Content(
            None, "None of the prepared scans is at its place any more, so patch-similarity maps are not shown."
        )
    cube = standardize(load_brain(table_path.parent, scan))
    index, tumour = MIDDLE_SLICE, None
    if label_path is not None:
        labels, affine = load_labels(label_path)
        if labels.any():
            index = patch_maps.tumour_slice(labels > 0, affine, cube.affine, cube.shape[2])
            tumour = patch_maps.axial_labels(labels, affine, cube.affine, index, cube.shape) > 0
    image = axial_slices(cube, [index])[0]

    pretrained = load_encoder(weights.parent)
    encoders = {"pretrained": pretrained, "untrained": load_encoder(f"{UNTRAINED_PREFIX}{weights.parent}")}
    points = patch_maps.reference_points(image, pretrained.patch_size, tumour)
    cells = _map_cells(image, points, encoders, names=_point_names(points, scan.sequence))
    grid = element("div", *cells, class_="maps", style=f"grid-template-columns: 6.5rem repeat({len(points) + 1}, 1fr)")
    place = "the middle of the brain" if tumour is None else "where the tumour is largest"
    lead = (
        f"{scan.subject_key}{', ' + scan.session if scan.session else ''}, {scan.sequence}: axial slice {index} of "
        f"{cube.shape[2]}, from below, {place}. "
        "Each map shows how alike every patch is to the framed one: cosine similarity of patch tokens after the last "
        "block (Eq. 12 of the paper), bilinear between patches, on one colour scale that is never stretched. "
        "The frames lie at the same place for every encoder and follow a rule: among patches of at least 90 % tissue, "
        f"{FIRST_RULE[points[0].name]}, then the darkest and the brightest of the others, "
        "without tumour and not at the edge of the tissue. "
        "The last column shows the first three principal components of the tissue's tokens as red, green and blue; "
        "each encoder has its own, so compare shapes, not colours."
    )
    bar = drawing(
        figures.svg(figures.colour_bar(), salt="similarity"), alt="Colour scale from -1, blue, over 0, white, to 1, red"
    )
    parts = [
        element("p", lead),
        element("div", grid, class_="scroll"),
        figure(bar, "Cosine similarity with the framed patch."),
    ]
    files = [weights, table_path, *([label_path] if label_path else [])]
    return make_content(root, parts, files, linked=files)


def _map_cells(
    image: np.ndarray,
    points: Sequence[patch_maps.ReferencePoint],
    encoders: Mapping[str, VisionTransformer],
    *,
    names: Sequence[str],
) -> list[Html]:
    """The cells of the grid of maps, row by row: the slice with its reference patches, then one row per encoder."""
    patch_size = next(iter(encoders.values())).patch_size
    grey = figures.grey_picture(image)
    cells = [element("div", class_="row")]
    cells += [element("div", name, class_="column") for name in (*names, "PCA")]
    cells.append(element("div", "slice", class_="row"))
    for point, name in zip(points, names, strict=True):
        marked = figures.mark_patch(grey, point.row, point.column, patch_size)
        cells.append(picture(figures.png(marked), alt=f"The slice, reference patch framed: {name}"))
    cells.append(picture(figures.png(grey), alt="The slice"))
    foreground = patch_maps.foreground_patches(image, patch_size)
    for word, encoder in encoders.items():
        patches = patch_maps.encode_patches(encoder, image)
        cells.append(element("div", word, element("small", encoder.name), class_="row"))
        for point, name in zip(points, names, strict=True):
            values = patch_maps.similarity_map(patches, patches[point.row, point.column])
            pixels = figures.similarity_picture(patch_maps.upsample(values, image.shape), image)
            pixels = figures.mark_patch(pixels, point.row, point.column, patch_size)
            low, high = values[foreground].min(), values[foreground].max()
            alt = f"{word} encoder: similarity with the {name} patch, {low:.2f} to {high:.2f} over the tissue"
            cells.append(picture(figures.png(pixels), alt=alt))
        colours = patch_maps.upsample(patch_maps.pca_map(patches, foreground), image.shape) * (image != 0)[..., None]
        cells.append(picture(figures.png(colours), alt=f"{word} encoder: principal components of the patch tokens"))
    return cells


def _scan_to_look_at(root: Path, scans: Sequence[Scan]) -> tuple[Scan | None, Path | None]:
    """The first prepared scan that is still there, and its label: with a tumour before without, T1c before T1."""
    cohort = root / "cohort"
    labels: dict[Path, Path] = {}  # folder of a session's images -> tumour label of that session
    for path in sorted(cohort.glob("derivatives/tumor/sub-*/**/*_dseg.nii*")):
        labels.setdefault((cohort / path.parent.relative_to(cohort / "derivatives" / "tumor")).resolve(), path)

    def rank(scan: Scan) -> tuple[bool, int, str, str]:
        place = SEQUENCE_ORDER.index(scan.sequence) if scan.sequence in SEQUENCE_ORDER else len(SEQUENCE_ORDER)
        return Path(scan.path).resolve().parent not in labels, place, scan.subject_key, scan.session

    for scan in sorted((scan for scan in scans if scan.status == "done"), key=rank):
        path = Path(scan.path)
        if path.is_file():
            return scan, labels.get(path.resolve().parent)
    return None, None


def _point_names(points: Sequence[patch_maps.ReferencePoint], sequence: str) -> list[str]:
    """Names for readers: on T1-weighted scans CSF is darkest, and white matter brightest."""
    tissue = (
        {"darkest": "darkest (CSF-like)", "brightest": "brightest (white-matter-like)"}
        if sequence in ("T1", "T1c")
        else {}
    )
    return [tissue.get(point.name, point.name) for point in points]
