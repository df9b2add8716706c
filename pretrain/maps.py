"""What the teacher holds to be alike within a few fixed slices, over the course of a run (paper sec. 4.6).

RUN/maps/iteration=NNNNNN.npz holds the maps of one look, RUN/maps.png all looks beside each other. Owner of both
(version 1).
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from braindino.atomic import replace_file
from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.patch_maps import encode_patches, foreground_patches, pca_map, similarity_map, upsample
from braindino.slice_store import SliceStore
from braindino.vision_transformer import VisionTransformer

FORMAT_VERSION = 1
MAX_LOOKS_DRAWN = 8
# Of the 256 axial slices of a standardised volume.
MIDDLE = 128
_REFERENCE_COLOUR = "#ffd400"


class FixedSlice(NamedTuple):
    """A slice that is looked at again and again.

    Attributes:
        title: sequence and subject.
        image: (H, W) float32.
        reference: (row, column) of the patch that the others are compared with: of those full of tissue the one nearest
            to the middle of the tissue.
    """

    title: str
    image: np.ndarray
    reference: tuple[int, int]


class Look(NamedTuple):
    """The maps of one iteration, S slices of equal size.

    Attributes:
        iteration: after which.
        similarity: (S, rows, columns) float16, cosine similarity of every patch with the reference patch (Eq. 12).
        colours: (S, rows, columns, 3) float16 in 0 to 1, first three principal components over the tissue.
    """

    iteration: int
    similarity: np.ndarray
    colours: np.ndarray


class TeacherMaps:
    """The maps of a run: looked at, kept and drawn as it goes on, and after it is resumed."""

    def __init__(self, run_dir: Path, store: SliceStore, usable: np.ndarray, *, number: int, start: int) -> None:
        """
        Args:
            run_dir: of the run.
            store: the store that is learnt from.
            usable: indices of its slices that the run may see.
            number: of slices.
            start: iterations done before, whose looks are drawn again.
        """
        self.run_dir = run_dir
        self.slices = choose_slices(store, usable, number=number)
        self.looks = read_looks(run_dir, until=start, like=self.slices)

    def look(self, encoder: VisionTransformer, iteration: int) -> None:
        """Keep and draw the maps of an encoder; nothing where no slice of the store shows enough tissue."""
        if not self.slices:
            return
        before = self.looks[-1] if self.looks else None
        self.looks.append(look_at(encoder, self.slices, iteration, before=before))
        save_look(self.run_dir, self.looks[-1])
        draw_looks(self.slices, self.looks, self.run_dir / "maps.png")


def choose_slices(store: SliceStore, usable: np.ndarray, *, number: int, patch_size: int = 16) -> list[FixedSlice]:
    """Slices near the middle of the brain, of as many sequences and then subjects as there are; fewer than ``number``
    where the store has fewer scans with tissue in the middle."""
    middle_of: dict[int, int] = {}
    for index in usable.tolist():
        row = int(store.scan_index[index])
        if row not in middle_of or _off_middle(store, index) < _off_middle(store, middle_of[row]):
            middle_of[row] = index
    seen: dict[str, int] = {}
    turns = []
    for row in sorted(middle_of, key=lambda row: store.scans[row].subject_key):
        sequence = store.scans[row].sequence
        turns.append((seen.setdefault(sequence, 0), sequence == UNKNOWN_SEQUENCE, sequence, row))
        seen[sequence] += 1
    chosen = []
    for _, _, sequence, row in sorted(turns):
        image = store.read_float16(middle_of[row]).astype(np.float32)
        foreground = foreground_patches(image, patch_size)
        # PCA needs more than three patches of tissue.
        if foreground.sum() < 4:
            continue
        places = np.argwhere(foreground)
        distance = ((places - places.mean(axis=0)) ** 2).sum(axis=1)
        reference = int(places[distance.argmin()][0]), int(places[distance.argmin()][1])
        chosen.append(FixedSlice(f"{sequence}, {store.scans[row].subject_key}", image, reference))
        if len(chosen) == number:
            break
    return chosen


def look_at(encoder: VisionTransformer, slices: Sequence[FixedSlice], iteration: int, *, before: Look | None) -> Look:
    """The maps of the slices; principal components have the signs that fit the look ``before`` best.

    The encoder is left in the mode in which it came.
    """
    training = encoder.training
    encoder.eval()
    similarity, colours = [], []
    for place, (_, image, reference) in enumerate(slices):
        patches = encode_patches(encoder, image)
        foreground = foreground_patches(image, encoder.patch_size)
        similarity.append(similarity_map(patches, patches[reference]))
        colour = pca_map(patches, foreground)
        if before is not None:
            colour[foreground] = _with_signs_of(colour[foreground], before.colours[place][foreground])
        colours.append(colour)
    encoder.train(training)
    return Look(iteration, np.array(similarity, dtype=np.float16), np.array(colours, dtype=np.float16))


def save_look(run_dir: Path, look: Look) -> None:
    """Write the maps of one look."""
    folder = run_dir / "maps"
    folder.mkdir(exist_ok=True)
    with replace_file(folder / f"iteration={look.iteration:06d}.npz") as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, version=FORMAT_VERSION, similarity=look.similarity, colours=look.colours)


def read_looks(run_dir: Path, *, until: int, like: Sequence[FixedSlice]) -> list[Look]:
    """The looks of a run up to an iteration, oldest first.

    Those of other slices (a run may be resumed with another number) and damaged ones are left out, with a notice.
    """
    looks = []
    for path in sorted((run_dir / "maps").glob("iteration=*.npz")):
        number = re.fullmatch(r"iteration=(\d+)\.npz", path.name)
        if number is None or int(number[1]) > until:
            continue
        try:
            with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                version = int(arrays["version"])
                look = Look(int(number[1]), arrays["similarity"], arrays["colours"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f"{path}: damaged, left out ({error})", flush=True)
            continue
        if version != FORMAT_VERSION or len(look.similarity) != len(like):
            print(f"{path}: maps of other slices or of another version, left out", flush=True)
            continue
        looks.append(look)
    return looks


def draw_looks(slices: Sequence[FixedSlice], looks: Sequence[Look], path: Path) -> None:
    """A picture: for each slice a row of similarity maps and a row of principal components, a column for each look;
    of many looks the first, the last and some between."""
    shown = [looks[i] for i in np.unique(np.linspace(0, len(looks) - 1, MAX_LOOKS_DRAWN).round().astype(int))]
    figure = Figure(figsize=(1.3 * (1 + len(shown)) + 1.2, 2.6 * len(slices) + 0.4), layout="constrained")
    axes = figure.subplots(2 * len(slices), 1 + len(shown), squeeze=False)
    image = None
    for place, fixed in enumerate(slices):
        height, width = fixed.image.shape
        side = height // looks[0].similarity.shape[1]
        low, high = np.percentile(fixed.image[fixed.image != 0], [1, 99])
        for row in (2 * place, 2 * place + 1):
            axes[row, 0].imshow(fixed.image, cmap="gray", vmin=low, vmax=high)
        axes[2 * place, 0].set_ylabel(f"{fixed.title}\nsimilarity", fontsize="x-small")
        axes[2 * place + 1, 0].set_ylabel("PCA", fontsize="x-small")
        for column, look in enumerate(shown, start=1):
            values = upsample(look.similarity[place].astype(np.float32), (height, width))
            values = np.ma.masked_where(fixed.image == 0, values)
            image = axes[2 * place, column].imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
            colours = upsample(look.colours[place].astype(np.float32), (height, width)) * (fixed.image != 0)[..., None]
            axes[2 * place + 1, column].imshow(colours.clip(0, 1))
        for column in range(1 + len(shown)):
            y, x = (coordinate * side + side / 2 for coordinate in fixed.reference)
            axes[2 * place, column].plot(x, y, "s", markersize=5, markerfacecolor="none", color=_REFERENCE_COLOUR)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("slice", fontsize="small")
    for column, look in enumerate(shown, start=1):
        axes[0, column].set_title(f"iteration {look.iteration}", fontsize="small")
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.4, label="cosine similarity with the framed patch")
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=80)


def _off_middle(store: SliceStore, index: int) -> int:
    return abs(store.position_of(index) - MIDDLE)


def _with_signs_of(colours: np.ndarray, before: np.ndarray) -> np.ndarray:
    """(n, 3) components in 0 to 1, each turned over where that correlates better with the one before."""
    centred, other = colours - colours.mean(axis=0), before.astype(np.float64) - before.mean(axis=0, dtype=np.float64)
    return np.where((centred * other).sum(axis=0) < 0, 1 - colours, colours)
