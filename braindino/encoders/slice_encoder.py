"""What the encoders of slices share: equally spaced axial slices of the standard cube, and means over them (paper
sec. 4.3).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braindino.encoders.contract import (
    Features,
    Identity,
    Layers,
    Prepared,
    SliceFeatures,
    TokenGrid,
    TokenPlane,
    VolumeEncoder,
    block_number,
    even_centres,
)
from braindino.slices import DEPTH, NUM_SLICES, SLICE_ORIENTATION, axial_slices, uniform_indices
from braindino.transforms import CLIP_PERCENTILES, CUBE_SHAPE, crop_to_foreground, normalize_intensity, resize
from braindino.volume import Volume, VolumeError

INTENSITIES = ("zscore", "imagenet")
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class SlicePreparation:
    """How a volume becomes slices; the defaults are the pipeline of the paper."""

    num_slices: int = NUM_SLICES
    """Equally spaced over the 256 axial slices of the standard cube."""
    image_size: int = CUBE_SHAPE[0]
    """Rows and columns; the paper's analysis of layers (sec. 4.6) has 224."""
    intensity: str = "zscore"
    """``zscore``: as in pretraining. ``imagenet``: the 0.5-99.5 percentile range becomes 0 to 1, then the channels get
    the mean and deviation of ImageNet; what encoders of natural images were trained with, which the paper leaves
    open."""

    def __post_init__(self) -> None:
        if self.intensity not in INTENSITIES:
            raise ValueError(f"intensity: found {self.intensity!r}; expected one of {', '.join(INTENSITIES)}")
        if self.image_size < 1:
            raise ValueError(f"image_size: found {self.image_size}; expected more than 0")
        uniform_indices(self.num_slices)

    def describe(self) -> dict[str, Any]:
        """JSON values that say what happens to the volume."""
        return {"cube": list(CUBE_SHAPE), "orientation": SLICE_ORIENTATION, **asdict(self)}

    def apply(self, volume: Volume, *, sequence: str | None) -> Prepared:
        """Slices (num_slices, 1, image_size, image_size), lowest first.

        Raises:
            VolumeError: code ``constant``: no foreground, or no contrast.
        """
        cube = resize(crop_to_foreground(volume))
        cube = normalize_intensity(cube) if self.intensity == "zscore" else _scale_to_one(cube)
        slices = torch.from_numpy(axial_slices(cube, uniform_indices(self.num_slices)))[:, None]
        if self.image_size != CUBE_SHAPE[0]:
            slices = F.interpolate(slices, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return Prepared(slices, sequence, cube.affine, volume.affine)

    def channels(self, slices: Tensor) -> Tensor:
        """What the network is given for slices (B, 1, H, W): the same, or (B, 3, H, W) on ImageNet's scale."""
        if self.intensity == "zscore":
            return slices
        mean, deviation = (slices.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
        return (slices - mean) / deviation


class BatchFeatures(NamedTuple):
    """Features of B slices."""

    global_: Tensor
    """(B, D)."""
    layers: Layers
    """(B, D) each, D by depth."""
    maps: Tensor
    """(B, D, rows, columns) tokens of the last layer."""
    in_place_of_patches: Tensor | None = None
    """(B, D') what to say where the mean patch token is asked for and says nothing."""

    @property
    def patch_means(self) -> Tensor:
        """(B, D) mean patch token of each slice."""
        return self.maps.float().mean(dim=(2, 3)) if self.in_place_of_patches is None else self.in_place_of_patches


class SliceEncoder(VolumeEncoder):
    """A network of slices behind the contract: every feature of a volume is the mean over its slices."""

    def __init__(
        self,
        network: nn.Module | None,
        *,
        name: str,
        sha256: str,
        dim: int,
        preparation: SlicePreparation,
        reading: dict[str, Any],
    ) -> None:
        """Freezes ``network`` and puts it into ``eval()``."""
        self.network = None if network is None else network.eval().requires_grad_(False)
        self.dim = dim
        self.preparation = preparation
        self.identity = Identity(name, sha256, preparation.describe(), reading)

    def prepare(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        return self.preparation.apply(volume, sequence=sequence)

    def encode(
        self, prepared: Sequence[Prepared], *, batch_size: int | None = None, with_tokens: bool = True
    ) -> list[Features]:
        """See ``VolumeEncoder``; 32 slices in a pass unless ``batch_size`` says otherwise, of two volumes where one
        ends within a pass.
        """
        # Of each volume, pass by pass: the columns of all but the maps side by side, and the maps.
        rows: list[list[Tensor]] = [[] for _ in prepared]
        maps: list[list[Tensor]] = [[] for _ in prepared]
        on_gpu = self.device.type == "cuda"
        widths: list[int] = []
        with torch.inference_mode():
            for parts in _batches([each.data for each in prepared], batch_size or BATCH_SIZE):
                # But for tokens nothing waits for a GPU: the next pass is in its queue before this one is done.
                slices = [part.to(self.device, non_blocking=on_gpu) for _, part in parts]
                result = self._features(self.preparation.channels(torch.cat(slices) if len(slices) > 1 else slices[0]))
                columns = (result.global_, result.patch_means, *result.layers)
                widths = [column.shape[1] for column in columns]
                found = torch.cat([column.float() for column in columns], dim=1).to("cpu", non_blocking=on_gpu)
                counts = [len(part) for _, part in parts]
                for (volume, _), row in zip(parts, found.split(counts), strict=True):
                    rows[volume].append(row)
                if with_tokens:
                    for (volume, _), each in zip(parts, result.maps.float().cpu().split(counts), strict=True):
                        maps[volume].append(each)
            if on_gpu:
                torch.cuda.current_stream(self.device).synchronize()
        features = []
        for each, its_rows, its_maps in zip(prepared, rows, maps, strict=True):
            cls, patches, *layers = (part.contiguous() for part in torch.cat(its_rows).split(widths, dim=1))
            early, mid, late = (layer.mean(dim=0) for layer in layers)
            heights = uniform_indices(len(each.data)).astype(np.float64)
            tokens = _token_grid(torch.cat(its_maps), heights, each) if with_tokens else None
            features.append(Features(cls.mean(dim=0), Layers(early, mid, late), tokens, SliceFeatures(cls, patches)))
        return features

    def prepare_planes(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        return replace(self.preparation, num_slices=DEPTH).apply(volume, sequence=sequence)

    def encode_plane(
        self, prepared: Prepared, point: np.ndarray, *, block: int | None = None, norm: bool = True
    ) -> TokenPlane | None:
        """See ``VolumeEncoder``; of two slices equally near, the lower."""
        number = block_number(block, self.num_blocks)
        level = self.nearest_slice(prepared, point)
        if level is None:
            return None
        with torch.inference_mode():
            return self._token_plane(self._maps(self._slice(prepared, level), number, norm=norm), prepared, level)

    def nearest_slice(self, prepared: Prepared, point: np.ndarray) -> int | None:
        """Which of the slices that were prepared ``encode_plane`` reads for a point (3,) in mm."""
        height = float((np.linalg.inv(prepared.affine) @ (*point, 1.0))[2])
        if not -0.5 <= height <= CUBE_SHAPE[2] - 0.5:
            return None
        # Rounded: which of two is nearer must not be left to the last digits of an inverse.
        return int(np.abs(uniform_indices(len(prepared.data)) - round(height, 6)).argmin())

    def _slice(self, prepared: Prepared, level: int) -> Tensor:
        """(1, 1 or 3, H, W): what the network is given for one slice."""
        return self.preparation.channels(prepared.data[level : level + 1].to(self.device))

    def _token_plane(self, maps: Tensor, prepared: Prepared, level: int) -> TokenPlane:
        """(1, D, rows, columns) tokens of one slice, on the axes of the volume."""
        height = uniform_indices(len(prepared.data))[level : level + 1].astype(np.float64)
        grid = _token_grid(maps.float().cpu(), height, prepared)
        x, y, z = grid.centres
        return TokenPlane(grid.features[:, :, 0], (x, y), float(z[0]), grid.affine)

    def slice_features(self, slices: Tensor) -> SliceFeatures:
        """What ``encode`` says of slices (B, 1, H, W) of ``prepare``, on the encoder's device, with gradients where its
        weights need them: for who trains the network.
        """
        result = self._features(self.preparation.channels(slices))
        return SliceFeatures(result.global_, result.patch_means)

    @abstractmethod
    def _features(self, slices: Tensor) -> BatchFeatures:
        """The features of slices (B, 1 or 3, H, W)."""

    @abstractmethod
    def _maps(self, slices: Tensor, block: int, *, norm: bool) -> Tensor:
        """(B, D, rows, columns) tokens of slices (B, 1 or 3, H, W) after a block; ``norm`` as in ``encode_plane``."""


def _batches(volumes: Sequence[Tensor], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """The slices of volumes, ``size`` at a time, as (number of the volume, slices of it): only the last has fewer."""
    batch: list[tuple[int, Tensor]] = []
    room = size
    for number, volume in enumerate(volumes):
        rest = volume
        while len(rest):
            part, rest = rest[:room], rest[room:]
            batch.append((number, part))
            room -= len(part)
            if not room:
                yield batch
                batch, room = [], size
    if batch:
        yield batch


def _token_grid(maps: Tensor, heights: np.ndarray, prepared: Prepared) -> TokenGrid:
    """(slices, D, rows, columns) on the axes of the volume: rows run backwards along y, columns along x, slices lie at
    ``heights``.
    """
    features = maps.flip(2, 3).permute(3, 2, 0, 1).contiguous()
    x, y = (even_centres(size, num) for size, num in zip(CUBE_SHAPE, features.shape[:2], strict=False))
    return TokenGrid(features, (x, y, heights), prepared.affine, prepared.volume_affine)


def _scale_to_one(volume: Volume) -> Volume:
    low, high = np.percentile(volume.data, CLIP_PERCENTILES).astype(np.float32)
    if not high > low:
        raise VolumeError("constant", "no contrast is left between the 0.5 and 99.5 percentile; expected an image")
    return Volume(np.clip((volume.data - low) / (high - low), 0, 1), volume.affine, volume.notes)
