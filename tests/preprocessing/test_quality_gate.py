"""The gate: a normal brain passes, whatever the grid; an empty, a half, a leaking and a whole-head mask do not."""

import numpy as np
import pytest
from scipy import ndimage

from braindino.preprocessing.quality_gate import (
    MaskFindings,
    examine_mask,
    gate_picture,
    second_opinion,
)
from braindino.volume import Volume


@pytest.fixture
def head(phantom):
    return Volume(phantom.head, phantom.affine)


def faults(mask, volume):
    return [fault.partition(":")[0] for fault in examine_mask(mask, volume).faults()]


def test_a_normal_brain_passes_and_its_volume_is_in_ml(phantom, head):
    findings = examine_mask(phantom.brain, head)
    assert findings.faults() == []
    # The ellipsoid's, in cubic centimetres.
    assert findings.brain_ml == pytest.approx(4 / 3 * np.pi * 6.0 * 7.4 * 5.2, rel=0.01)
    assert (findings.components, findings.largest_component, findings.border, findings.holes) == (1, 1.0, 0.0, 0.0)
    assert findings.agreement > 0.9 and findings.covered > 0.95 and findings.inside == 1.0


@pytest.mark.parametrize("sampling", [(2, 2, 2), (1, 1, 2), (3, 1, 1), (1, 2, 2)])
def test_what_is_found_does_not_depend_on_the_grid(phantom, head, sampling):
    finer = Volume(
        np.kron(phantom.head, np.ones(sampling, np.float32)), phantom.affine @ np.diag([*(1 / s for s in sampling), 1])
    )
    found = examine_mask(np.kron(phantom.brain, np.ones(sampling, bool)), finer)
    wanted = examine_mask(phantom.brain, head)
    assert found.faults() == []
    for name in ("brain_ml", "agreement", "covered", "inside"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=0.01), name


def test_thick_slices_pass(phantom):
    thick = Volume(phantom.head[:, :, ::2], phantom.affine @ np.diag([1, 1, 2, 1]))  # 8 mm
    assert faults(phantom.brain[:, :, ::2], thick) == []


@pytest.mark.parametrize("contrast", ["inverted brain", "fluid bright", "offset", "bias", "noise"])
def test_the_second_opinion_sees_the_head_in_any_contrast(phantom, head, contrast):
    tissue = phantom.brain.astype(np.float32)
    x = np.linspace(-1, 1, 40)[:, None, None]
    rng = np.random.default_rng(3)
    image = {
        "inverted brain": np.where(phantom.brain, 900 - phantom.head, phantom.head),
        "fluid bright": phantom.head + 900 * tissue * (ndimage.distance_transform_edt(phantom.brain) < 2),
        "offset": phantom.head - 400,
        "bias": phantom.head * (1 + 0.6 * x),
        "noise": np.hypot(phantom.head, 60 * rng.standard_normal(phantom.head.shape)),
    }[contrast]
    assert faults(phantom.brain, Volume(image.astype(np.float32), phantom.affine)) == []


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda p, x, y, z: p.brain & False, {"empty"}),
        (lambda p, x, y, z: p.brain & (x < 20), {"agreement", "missing brain"}),
        (lambda p, x, y, z: p.brain & (x >= 20), {"agreement", "missing brain"}),
        (lambda p, x, y, z: p.brain & (z >= 19), {"agreement", "missing brain"}),
        (lambda p, x, y, z: p.brain & (z < 19), {"agreement", "missing brain"}),
        (lambda p, x, y, z: p.brain & (y < 24), {"agreement", "missing brain"}),
        (lambda p, x, y, z: p.brain & ~((x < 20) & (z < 19)), {"missing brain"}),
        (lambda p, x, y, z: p.head > 50, {"agreement", "leak"}),
        (lambda p, x, y, z: p.brain | True, {"volume", "border", "agreement", "leak"}),
        (lambda p, x, y, z: p.brain | ((p.head > 700) & (z < 8)), {"leak"}),
        (lambda p, x, y, z: p.brain | ((p.head > 700) & (y > 36) & (z < 20)), {"leak"}),
        (lambda p, x, y, z: np.roll(p.brain, 7, axis=0), {"agreement", "missing brain", "leak"}),
        (lambda p, x, y, z: p.brain & (z < 14) & (y < 20), {"volume", "agreement", "missing brain"}),
        (lambda p, x, y, z: ndimage.binary_erosion(p.brain, iterations=3), {"agreement"}),
        (lambda p, x, y, z: p.brain & ((x - 20) ** 2 + (y - 24) ** 2 + (z - 18) ** 2 > 40), {"holes"}),
        (lambda p, x, y, z: p.brain & (abs(x - 20) > 2), {"pieces", "agreement", "missing brain"}),
    ],
    ids=["empty", "left", "right", "upper", "lower", "back", "three_quarters", "whole_head", "everything", "neck",
         "eyes", "shifted", "cerebellum", "thin", "hole", "two_pieces"],
)  # fmt: skip
def test_wrong_masks_are_flagged(phantom, head, wrong, what):
    x, y, z = np.ogrid[:40, :48, :36]
    assert what <= set(faults(wrong(phantom, x, y, z), head))


def test_faults_say_what_was_found_and_expected():
    findings = MaskFindings(
        brain_ml=120.0,
        components=4,
        largest_component=0.5,
        border=0.2,
        agreement=0.3,
        covered=0.4,
        holes=0.1,
        inside=0.6,
    )
    assert findings.faults() == [
        "volume: 120 ml, expected a brain of 300 to 2300 ml",
        "pieces: 50% of it in the largest of 4 parts, expected at least 90%",
        "border: 20.0% of it on the faces of the field of view, expected at most 5%",
        "agreement: Dice 0.30 with the second opinion, expected at least 0.75",
        "missing brain: 40% of where a brain must be, expected at least 85%",
        "holes: 10.0% of it, expected at most 2%",
        "leak: 60% of it where a brain can be, expected at least 97%",
    ]


def test_components_and_border_are_counted_on_the_voxels(phantom, head):
    mask = phantom.brain.copy()
    mask[0, 0, :3] = True
    mask[5, 2, 30] = True
    findings = examine_mask(mask, head)
    num_brain = np.count_nonzero(phantom.brain)
    assert (findings.components, findings.largest_component) == (3, num_brain / (num_brain + 4))
    cut = slice(0, 19)  # through the widest level
    below = Volume(phantom.head[:, :, cut], phantom.affine)
    findings = examine_mask(phantom.brain[:, :, cut], below)
    on_the_face = np.count_nonzero(phantom.brain[:, :, 18])
    assert findings.border == pytest.approx(on_the_face / np.count_nonzero(phantom.brain[:, :, cut]))


def test_a_scan_without_a_head_has_no_second_opinion(phantom):
    blank = Volume(np.zeros_like(phantom.head), phantom.affine)
    assert not second_opinion(blank).brain.any()
    assert {"agreement", "missing brain", "leak"} <= set(faults(phantom.brain, blank))


def test_a_mask_of_another_grid_is_refused(phantom, head):
    with pytest.raises(ValueError, match=r"mask of shape \(40, 48, 35\) does not fit its scan of \(40, 48, 36\)"):
        examine_mask(phantom.brain[:, :, 1:], head)


def red(picture):
    return (picture == (255, 64, 64)).all(axis=-1)


def test_the_picture_has_three_planes_to_scale_with_right_on_the_left_and_front_up():
    data = np.zeros((40, 60, 20), np.float32)
    data[:20] = 100  # the patient's left half is bright... and the front third is brighter
    data[:, 40:] += 80
    mask = np.zeros(data.shape, bool)
    mask[28:36, 40:50, 8:12] = True  # right, in front
    picture = gate_picture(Volume(data, np.diag([4.0, 4.0, 10.0, 1])), mask)
    height, width, _ = picture.shape
    assert picture.dtype == np.uint8 and height <= 300 and width <= 900
    # Extents are 160 x 240 x 200 mm: sagittal 240 wide, the other two 160; the tallest is 240.
    assert width / height == pytest.approx((240 + 160 + 160) / 240, rel=0.02)
    per_mm = height / 240
    sagittal, coronal, axial = np.split(picture, [int(240 * per_mm), int(240 * per_mm) + int(160 * per_mm)], axis=1)
    rows, columns = np.nonzero(red(axial))
    assert columns.mean() / per_mm == pytest.approx(160 - 4 * 32, abs=4)  # right is left
    assert rows.mean() / per_mm == pytest.approx(240 - 4 * 45, abs=4)  # front is up
    rows, columns = np.nonzero(red(sagittal))
    assert columns.mean() / per_mm == pytest.approx(240 - 4 * 45, abs=4)  # nose to the left
    assert rows.mean() / per_mm == pytest.approx(20 + 200 - 10 * 10, abs=4)
    assert red(coronal).any()
    # The left half of the patient is on the right of the axial plane, and bright.
    level = int(200 * per_mm)
    assert axial[level, -5, 0] > axial[level, 5, 0]


def test_an_empty_mask_and_a_blank_scan_still_give_a_picture(phantom, head):
    picture = gate_picture(head, np.zeros_like(phantom.brain))
    assert picture.std() > 10 and not red(picture).any()
    assert not gate_picture(Volume(np.zeros_like(phantom.head), phantom.affine), phantom.brain & False).any()


def test_wide_fields_of_view_fit_the_page():
    flat = Volume(np.random.default_rng(0).random((50, 50, 5)).astype(np.float32), np.diag([9.0, 9.0, 2.0, 1]))
    picture = gate_picture(flat, np.zeros(flat.shape, bool))
    assert picture.shape[0] <= 300 and picture.shape[1] <= 900
