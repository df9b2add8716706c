"""Grids of the sites: geometry, storage order, slice profile."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from braindino.simulation.protocols import PROTOCOLS, Grid


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.site)
def test_storage_puts_every_voxel_where_the_affine_says(protocol):
    grid = Grid(protocol)
    places = np.stack(np.meshgrid(*grid.centres, indexing="ij"))
    stored = [grid.to_storage(places[axis]) for axis in range(3)]

    assert "".join(nib.aff2axcodes(grid.affine)) == protocol.orientation
    np.testing.assert_allclose(nib.affines.voxel_sizes(grid.affine), protocol.spacing)
    for index in [(0, 0, 0), (3, 5, 7), tuple(size - 1 for size in stored[0].shape)]:
        np.testing.assert_allclose([part[index] for part in stored], apply_affine(grid.affine, index), atol=1e-9)


def test_the_four_sites_differ_in_orientation_spacing_and_scale():
    assert {protocol.orientation for protocol in PROTOCOLS} >= {"RAS", "LPS", "LAS"}
    assert any(protocol.orientation[2] in "LR" for protocol in PROTOCOLS), "no site with sagittal slices"
    assert any(protocol.spacing[2] > protocol.thickness for protocol in PROTOCOLS), "no site with a gap"
    for column in ("site", "orientation", "spacing", "scale", "noise"):
        assert len({getattr(protocol, column) for protocol in PROTOCOLS}) == len(PROTOCOLS) >= 4, column


def test_a_thick_slice_is_the_mean_over_its_thickness_and_nothing_of_the_gap():
    protocol = replace(PROTOCOLS[0], orientation="RAS", spacing=(8.0, 8.0, 10.0), thickness=6.0)
    grid = Grid(protocol)
    x, y, z = grid.samples
    centres = grid.centres[2]

    assert len(z) == 5 * len(centres)
    assert np.abs(z.reshape(-1, 5) - centres[:, None]).max() == pytest.approx(2.4)  # the middle of the outermost fifth
    ramp = np.broadcast_to(z, (len(x), len(y), len(z)))
    np.testing.assert_allclose(grid.average_slices(ramp)[0, 0], centres)
    # A step 0.6 mm above the centre of a slice of 6 mm: two of five samples lie above it.
    step = np.broadcast_to(z > centres[4] + 0.6, ramp.shape).astype(float)
    np.testing.assert_allclose(grid.average_slices(step)[0, 0, 3:6], [0.0, 0.4, 1.0])
