import os

import numpy as np
import pytest
import torch

from braindino.downstream.extract import main
from braindino.encoders.intensity import encode_intensity
from braindino.feature_table import FeatureTable
from braindino.leakage import Exposure, exposure_of_encoder, write_exposure
from braindino.manifest import Scan, load_brain, mask_path, read_scans, write_scans
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import standardize
from braindino.vision_transformer import VisionTransformer
from braindino.volume import save_array, save_mask_like
from braindino.weights import load_encoder, save_encoder


@pytest.fixture
def prepared(tmp_path):
    """Two scans of asymmetric noise blobs on a small LPS grid, the first with a brain mask of ours."""
    rng = np.random.default_rng(0)
    affine = np.diag([-3.0, -3.0, 4.0, 1.0])
    scans = []
    for number, sequence in enumerate(("T1", "FLAIR")):
        data = np.zeros((20, 24, 18), np.float32)
        data[3:15, 4:20, 2:14] = rng.uniform(50, 150, (12, 16, 12))
        data[3:6, 4:8, 2:5] += 200
        path = tmp_path / f"sub-01_{sequence}.nii.gz"
        save_array(data, affine, path, dtype=np.float32)
        scans.append(Scan(str(path), cohort="phantom", subject="01", sequence=sequence, num_slices=number))
    folder = tmp_path / "prepared"
    (folder / "masks").mkdir(parents=True)
    mask = np.zeros((20, 24, 18), bool)
    mask[6:16, 5:18, 3:13] = True
    save_mask_like(mask, scans[0].path, mask_path(folder, scans[0]))
    skipped = Scan("/nowhere/mask.nii.gz", cohort="phantom", subject="01", status="skipped", reason="label_map: a mask")
    write_scans(folder / "scans.tsv", [*scans, skipped])
    return folder


@pytest.fixture
def encoder_dir(tmp_path):
    torch.manual_seed(0)
    encoder = VisionTransformer(embed_dim=64, depth=1, num_heads=1, layer_scale_init=1.0).eval()
    save_encoder(encoder, tmp_path / "encoder")
    return tmp_path / "encoder"


def extract(prepared, encoder, out, *more):
    arguments = [
        "--prepared",
        prepared,
        "--encoder",
        encoder,
        "--out",
        out,
        "--num-slices",
        3,
        "--device",
        "cpu",
        *more,
    ]
    return main([str(argument) for argument in arguments])


def test_features_equal_the_hand_loop_through_load_standardise_and_encoder(prepared, encoder_dir, tmp_path):
    assert extract(prepared, encoder_dir, tmp_path / "features", "--batch-size", 2) == 0
    table = FeatureTable(tmp_path / "features")
    encoder = load_encoder(encoder_dir)
    assert [scan.sequence for scan in table.scans] == ["T1", "FLAIR"]
    assert table.meta.encoder_sha256 == encoder.sha256
    for scan, feature in zip(table.scans, table.features, strict=True):
        slices = axial_slices(standardize(load_brain(prepared, scan)), uniform_indices(3))
        with torch.inference_mode():
            cls = torch.stack([encoder(torch.from_numpy(one)[None, None]).cls[0] for one in slices]).numpy()
        np.testing.assert_allclose(table.slices(scan), cls, atol=1e-5)
        np.testing.assert_allclose(feature, cls.mean(axis=0), atol=1e-5)
    assert np.abs(table.features[0] - table.features[1]).max() > 1e-3


def test_a_second_run_encodes_nothing_again(prepared, tmp_path, capsys):
    assert extract(prepared, "intensity", tmp_path / "features") == 0
    files = sorted((tmp_path / "features" / "cls").iterdir())
    before = [path.stat().st_mtime_ns for path in files]
    assert extract(prepared, "intensity", tmp_path / "features") == 0
    assert [path.stat().st_mtime_ns for path in files] == before
    assert "0 done in" in capsys.readouterr().out.splitlines()[-1]


def test_a_scan_with_a_newer_mask_is_encoded_again_and_the_other_is_not(prepared, tmp_path):
    extract(prepared, "intensity", tmp_path / "features")
    first, second = FeatureTable(tmp_path / "features").scans
    paths = [tmp_path / "features" / "cls" / f"{scan.scan_id}.npy" for scan in (first, second)]
    for path in paths:
        os.utime(path, (2e9, 2e9))
    os.utime(mask_path(prepared, first), (3e9, 3e9))
    extract(prepared, "intensity", tmp_path / "features")
    assert paths[0].stat().st_mtime != 2e9
    assert paths[1].stat().st_mtime == 2e9


def test_a_folder_with_features_of_another_encoder_is_refused(prepared, encoder_dir, tmp_path, capsys):
    extract(prepared, "intensity", tmp_path / "features")
    assert extract(prepared, encoder_dir, tmp_path / "features") == 1
    assert "holds features of encoder 'intensity'" in capsys.readouterr().err


def test_a_broken_scan_ends_as_a_row_with_a_reason_and_the_rest_is_done(prepared, tmp_path, capsys):
    scans = read_scans(prepared / "scans.tsv")
    broken = tmp_path / "sub-01_T1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    assert extract(prepared, "intensity", tmp_path / "features") == 3
    assert FeatureTable(tmp_path / "features").scans == [scans[1]]
    (row,) = read_scans(tmp_path / "features" / "quarantined.tsv")
    assert (row.scan_id, row.status) == (scans[0].scan_id, "quarantined")
    assert row.reason.startswith("truncated: ")
    assert "sub-01_T1.nii.gz" in capsys.readouterr().err


def test_a_scan_that_has_gone_is_a_row_too(prepared, tmp_path):
    (tmp_path / "sub-01_FLAIR.nii.gz").unlink()
    assert extract(prepared, "intensity", tmp_path / "features") == 3
    (row,) = read_scans(tmp_path / "features" / "quarantined.tsv")
    assert row.reason.startswith("FileNotFoundError: ")


def test_a_folder_without_done_scans_is_an_error(tmp_path, capsys):
    write_scans(tmp_path / "scans.tsv", [Scan("/x.nii", "c", "s", status="quarantined", reason="constant: all zero")])
    assert extract(tmp_path, "intensity", tmp_path / "features") == 1
    assert "no scan with status done" in capsys.readouterr().err


def test_intensity_features_are_a_density_and_a_coarse_mean_slice():
    slices = torch.zeros(1, 1, 32, 32)
    slices[0, 0, :16, :16] = 1.1  # a quarter of the slice, top left
    slices[0, 0, 16:, 16:] = -9.0  # beyond the limit: the lowest bin
    features = encode_intensity(slices)[0]
    density, grid = features[:32], features[32:].reshape(16, 16)
    expected = torch.zeros(32)
    expected[20] = expected[0] = 0.25 / 0.25  # (1.1 + 4) / 0.25 = 20.4; a quarter of the area over the width of a bin
    torch.testing.assert_close(density, expected)
    torch.testing.assert_close(grid[:8, :8], torch.full((8, 8), 1.1))
    torch.testing.assert_close(grid[8:, 8:], torch.full((8, 8), -9.0))
    assert grid[:8, 8:].abs().max() == 0


def test_what_the_encoder_was_pretrained_on_travels_with_its_features(prepared, encoder_dir, tmp_path):
    assert extract(prepared, encoder_dir, tmp_path / "before") == 0
    assert exposure_of_encoder(tmp_path / "before") is None
    seen = Exposure((Scan("", "phantom", "01", sequence="T1", content_hash="c"),))
    write_exposure(encoder_dir / "pretrained_on.tsv", seen)
    assert extract(prepared, encoder_dir, tmp_path / "features") == 0
    assert exposure_of_encoder(tmp_path / "features") == seen
    assert extract(prepared, "intensity", tmp_path / "intensity") == 0
    assert exposure_of_encoder(tmp_path / "intensity") == Exposure()
