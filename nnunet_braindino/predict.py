"""``braindino segment``: whole volumes at once, with the labels of ``nnUNetv2_predict``, sooner.

nnU-Net sends one slice after another through the network, four times with mirroring. Here slices go in batches, slices
of zeros are computed once, and the decoder computes only the part of a patch that lies in the image: BraTS brains fill
two fifths of 256x256. Reading, preprocessing, Gaussian weighting, resampling and export are nnU-Net's own. Mirroring is
an option. A network that looks at neighbouring slices sees the whole volume as one stack, each slice encoded once.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor

from braindino.command_line import command_line
from braindino.devices import choose_device
from nnunet_braindino.context import REACH, ContextSegmenter
from nnunet_braindino.encoder_checkpoint import FINAL_CHECKPOINT
from nnunet_braindino.network import EncoderSegmenter
from nnunet_braindino.predictions import write_prediction_source
from nnunet_braindino.trainer_plans import ENCODER_PATCH

BATCH_SIZE = 16
# nnU-Net's own values.
SIGMA_SCALE, GAUSSIAN_PEAK = 1 / 8, 10


class Box(NamedTuple):
    """A rectangle of encoder patches within a window."""

    rows: slice
    columns: slice

    def mirrored(self, axes: Sequence[int], grid: Sequence[int]) -> "Box":
        """Where it lies in a window that is mirrored along some of the axes 0 (rows) and 1 (columns)."""
        spans = list(self)
        for axis in axes:
            spans[axis] = slice(grid[axis] - spans[axis].stop, grid[axis] - spans[axis].start)
        return Box(*spans)

    def grown(self, margin: int, grid: Sequence[int]) -> "Box":
        """With the patches around it, as far as there are any."""
        return Box(
            *(
                slice(max(0, span.start - margin), min(size, span.stop + margin))
                for span, size in zip(self, grid, strict=True)
            )
        )

    def within(self, outer: "Box") -> "Box":
        """The same patches, counted from the corner of ``outer``."""
        return Box(*(slice(a.start - b.start, a.stop - b.start) for a, b in zip(self, outer, strict=True)))

    def pixels(self) -> tuple[slice, slice]:
        """Rows and columns of pixels."""
        rows, columns = (slice(span.start * ENCODER_PATCH, span.stop * ENCODER_PATCH) for span in self)
        return rows, columns


class SlicePredictor(nnUNetPredictor):
    """nnU-Net's predictor for the networks of this package, ``batch_size`` slices at a time."""

    batch_size = BATCH_SIZE

    @torch.inference_mode()
    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Logits (K, Z, Y, X) in half precision from a preprocessed image (C, Z, Y, X), as nnU-Net's method gives."""
        network = getattr(self.network, "_orig_mod", self.network)
        if not isinstance(network, EncoderSegmenter):
            raise ValueError(
                f"{self.trainer_name} builds a {type(network).__name__}, expected a network of a BrainDINO trainer "
                "on configuration 2d; use nnUNetv2_predict"
            )
        network.to(self.device).eval()
        place = self.device if self.perform_everything_on_device else torch.device("cpu")
        patch = tuple(self.configuration_manager.patch_size[-2:])
        data, inside = pad_nd_image(input_image, patch, "constant", {"value": 0}, True, None)
        data = data.to(place)
        gaussian = torch.ones(patch, dtype=torch.half, device=place)
        if self.use_gaussian:
            gaussian = compute_gaussian(patch, SIGMA_SCALE, GAUSSIAN_PEAK, device=place)
        logits = torch.zeros(
            (self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half, device=place
        )
        weights = torch.zeros(data.shape[2:], dtype=torch.half, device=place)
        row_steps, column_steps = compute_steps_for_sliding_window(data.shape[2:], patch, self.tile_step_size)
        for row, column in itertools.product(row_steps, column_steps):
            window = (slice(row, row + patch[0]), slice(column, column + patch[1]))
            box = _visible((row, column), patch, inside[-2:])
            with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
                found = self._predict_windows(network, data[(..., *window)].transpose(0, 1), box)
            # In place and in half precision, as nnU-Net adds windows up.
            found *= gaussian[box.pixels()]
            logits[(..., *window)][(..., *box.pixels())] += found.to(place).transpose(0, 1)
            weights[window] += gaussian
        torch.div(logits, weights, out=logits)
        if torch.isinf(logits).any():
            raise RuntimeError("the logits hold infinite values: too large for half precision, in which nnU-Net adds")
        return logits[(slice(None), *inside[1:])]

    def _predict_windows(self, network: EncoderSegmenter, windows: Tensor, box: Box) -> Tensor:
        """Logits (Z, K, rows, columns) of the pixels of ``box`` in windows (Z, C, H, W), averaged over mirrorings."""
        filled = windows.flatten(1).any(dim=1)
        # All slices of zeros are one; it goes last.
        numbers = torch.where(filled, filled.cumsum(0) - 1, filled.sum())
        distinct = windows[filled]
        if not filled.all():
            distinct = torch.cat([distinct, torch.zeros_like(windows[:1])])
        mirrorings = self._mirrorings()
        average = None
        for axes in mirrorings:
            dims = [axis + 2 for axis in axes]
            grid = [size // ENCODER_PATCH for size in windows.shape[2:]]
            seen, seen_box = distinct.flip(dims), box.mirrored(axes, grid)
            if isinstance(network, ContextSegmenter):
                logits = self._through_context(network, seen, numbers, seen_box, grid)
            else:
                decoded = [
                    network.decode(network.encode(part)[:, seen_box.rows, seen_box.columns]).to(windows.device)
                    for part in self._batches(seen)
                ]
                logits = torch.cat(decoded)
            logits = logits.flip(dims)
            average = logits if average is None else average.add_(logits)
        assert average is not None
        average /= len(mirrorings)
        return average if isinstance(network, ContextSegmenter) else average[numbers]

    def _through_context(
        self, network: ContextSegmenter, windows: Tensor, numbers: Tensor, box: Box, grid: Sequence[int]
    ) -> Tensor:
        """Logits of a whole stack, of which ``windows`` are the distinct slices: each is encoded once."""
        wide = box.grown(REACH, grid)
        parts = [network.encode(part)[:, wide.rows, wide.columns] for part in self._batches(windows)]
        features = torch.cat([part.to(windows.device) for part in parts])
        inner, decoded = box.within(wide), []
        for first in range(0, len(numbers), self.batch_size):
            last = min(first + self.batch_size, len(numbers))
            low, high = max(0, first - REACH), min(len(numbers), last + REACH)
            stack = features[numbers[low:high]].to(self.device)
            seen = network.context(stack[None])[0, first - low : last - low]
            decoded.append(network.decode(seen[:, inner.rows, inner.columns]).to(windows.device))
        return torch.cat(decoded)

    def _batches(self, windows: Tensor) -> Iterator[Tensor]:
        for part in windows.split(self.batch_size):
            yield part.to(self.device)

    def _mirrorings(self) -> list[tuple[int, ...]]:
        """Sets of axes of the slice (0 rows, 1 columns) to mirror, nothing first."""
        if not self.use_mirroring or not self.allowed_mirroring_axes:
            return [()]
        # The axes of a stack are counted from the slices.
        offset = len(self.configuration_manager.patch_size) - 2
        axes = [axis - offset for axis in self.allowed_mirroring_axes]
        return [chosen for size in range(len(axes) + 1) for chosen in itertools.combinations(axes, size)]


def _visible(corner: tuple[int, int], patch: Sequence[int], inside: Sequence[slice]) -> Box:
    """The patches of a window that lie in the image, which the padding surrounds."""
    spans = []
    for start, size, image in zip(corner, patch, inside, strict=True):
        low, high = max(image.start - start, 0), min(image.stop - start, size)
        spans.append(slice(low // ENCODER_PATCH, -(-high // ENCODER_PATCH)))
    return Box(*spans)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment whole volumes with a trained model, with nnU-Net's preprocessing and export."""

    model: tyro.conf.Positional[Path]
    """Model folder, RESULTS/DATASET/TRAINER__PLANS__2d."""
    images: tyro.conf.Positional[Path]
    """Folder of images named as nnU-Net wants them, CASE_0000.nii.gz and so on."""
    out: tyro.conf.Positional[Path]
    """Where CASE.nii.gz go."""
    folds: tuple[str, ...] = ()
    """Folds whose networks are averaged; by default every finished one."""
    checkpoint: str = FINAL_CHECKPOINT
    """Name of the checkpoint."""
    mirroring: bool = False
    """Average over mirrored slices, as nnUNetv2_predict does by default: four times the work."""
    step_size: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.5
    """Step between windows as a share of the patch, where slices are larger than a patch."""
    batch_size: int = BATCH_SIZE
    """Slices that go through the network together."""
    device: str = "auto"
    """cpu, cuda or mps; by default cuda where there is one."""
    workers: int = 0
    """Processes for reading and for writing; 0 does everything in this one, which is sooner for few cases."""
    probabilities: bool = False
    """Write them, too, as nnU-Net does (.npz)."""
    keep_existing: bool = False
    """Leave out cases that are there already."""


@command_line("segment")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when all is done, 1 on an error."""
    segment(tyro.cli(Segment, args=argv, prog="braindino segment", description=__doc__))
    return 0


def segment(command: Segment) -> None:
    """
    Raises:
        ValueError: no finished fold, no such checkpoint, or a model of another kind.
    """
    predictor = SlicePredictor(
        tile_step_size=command.step_size, use_mirroring=command.mirroring, device=choose_device(command.device)
    )
    predictor.batch_size = command.batch_size
    predictor.initialize_from_trained_model_folder(str(command.model), _folds(command), command.checkpoint)
    command.out.mkdir(parents=True, exist_ok=True)
    names = {
        "list_of_lists_or_source_folder": str(command.images),
        "output_folder_or_list_of_truncated_output_files": str(command.out),
        "save_probabilities": command.probabilities,
        "overwrite": not command.keep_existing,
    }
    if command.workers:
        predictor.predict_from_files(
            **names, num_processes_preprocessing=command.workers, num_processes_segmentation_export=command.workers
        )
    else:
        predictor.predict_from_files_sequential(**names)
    write_prediction_source(command.out, command.checkpoint)


def _folds(command: Segment) -> tuple[str, ...]:
    """The folds asked for, or all that hold the checkpoint."""
    found = sorted(
        path.parent.name.removeprefix("fold_") for path in command.model.glob(f"fold_*/{command.checkpoint}")
    )
    missing = [fold for fold in command.folds if fold not in found]
    if missing or not found:
        raise ValueError(
            f"{command.model}: found {command.checkpoint} in folds {found}, asked for {list(command.folds) or 'any'}; "
            "give the folder TRAINER__PLANS__2d of a finished training"
        )
    # 'all' was trained on every case; beside folds it is not one of them.
    return command.folds or tuple(fold for fold in found if fold != "all") or ("all",)


if __name__ == "__main__":
    raise SystemExit(main())
