"""Maps of fixed slices over a run: which slices, what they show, and that they go on after a kill."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from braindino.manifest import Scan
from braindino.patch_maps import foreground_patches
from braindino.pretrain.maps import FixedSlice, choose_slices, draw_looks, look_at, read_looks, save_look
from braindino.pretrain.train import main
from braindino.slice_store import SliceStore, SliceStoreWriter
from braindino.vision_transformer import VisionTransformer


def brain(seed: int) -> np.ndarray:
    rows, columns = np.mgrid[:256, :256]
    inside = (rows - 128) ** 2 + (columns - 128) ** 2 < 80**2
    return np.where(inside, np.random.default_rng(seed).standard_normal((256, 256)) + (columns > 128), 0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("maps") / "store"
    writer = SliceStoreWriter(folder)
    for number, (subject, sequence) in enumerate(
        [("b", "T1"), ("a", "T1"), ("a", "T2"), ("c", "T1"), ("d", "FLAIR"), ("e", "unknown")]
    ):
        slices = np.stack([brain(number), brain(number + 50), np.zeros((256, 256))])
        # The middle of FLAIR is empty: nothing to look at.
        order = [0, 2, 1] if sequence == "FLAIR" else [0, 1, 2]
        writer.add(Scan(f"/data/{number}.nii.gz", "c", subject, sequence=sequence), slices[order], [90, 130, 200])
    writer.publish()
    return folder


def test_slices_are_of_different_sequences_first_and_near_the_middle(store: Path) -> None:
    opened = SliceStore(store)
    chosen = choose_slices(opened, np.arange(len(opened)), number=4)
    assert [fixed.title for fixed in chosen] == ["T1, c/a", "T2, c/a", "unknown, c/e", "T1, c/b"]
    np.testing.assert_allclose(chosen[0].image, brain(1 + 50), atol=2e-3)
    row, column = chosen[0].reference
    assert foreground_patches(chosen[0].image, 16)[row, column] and {row, column} <= {7, 8}
    without_a = np.array([i for i in range(len(opened)) if opened.scan_of(i).subject != "a"])
    assert [fixed.title for fixed in choose_slices(opened, without_a, number=2)] == ["T1, c/b", "unknown, c/e"]


def encoder_of(seed: int) -> VisionTransformer:
    encoder = VisionTransformer(embed_dim=32, depth=2, num_heads=2, layer_scale_init=1.0)
    encoder.initialize(torch.Generator().manual_seed(seed))
    return encoder


def test_maps_keep_the_signs_of_the_look_before_and_survive_the_disk(tmp_path: Path) -> None:
    image = brain(0).astype(np.float32)
    slices = [FixedSlice("T1, c/a", image, (8, 8))]
    encoder = encoder_of(0).train()
    first = look_at(encoder, slices, 1, before=None)
    assert encoder.training and first.similarity[0, 8, 8] == pytest.approx(1, abs=1e-3)
    foreground = foreground_patches(image, 16)
    turned = first._replace(colours=np.where(foreground[..., None], 1 - first.colours, 0))
    again = look_at(encoder, slices, 2, before=turned)
    np.testing.assert_allclose(again.colours, turned.colours, atol=2e-3)
    for look in (first, again):
        save_look(tmp_path, look)
    (tmp_path / "maps" / "iteration=000003.npz").write_bytes(b"PK\x03\x04 cut short")
    np.testing.assert_array_equal(read_looks(tmp_path, until=1, like=slices)[0].similarity, first.similarity)
    assert [look.iteration for look in read_looks(tmp_path, until=2, like=slices)] == [1, 2]
    assert read_looks(tmp_path, until=9, like=slices * 2) == []


def test_a_damaged_look_is_left_out_with_a_notice(tmp_path: Path, capsys) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "iteration=000003.npz").write_bytes(b"PK\x03\x04 cut short")
    assert read_looks(tmp_path, until=3, like=[]) == []
    assert "iteration=000003.npz: damaged, left out" in capsys.readouterr().out


def test_the_picture_has_a_column_for_the_slice_and_at_most_eight_looks(tmp_path: Path) -> None:
    slices = [FixedSlice("T1, c/a", brain(0).astype(np.float32), (8, 8))]
    look = look_at(encoder_of(0), slices, 1, before=None)
    widths = []
    for number in (1, 8, 30):
        draw_looks(slices, [look._replace(iteration=i) for i in range(number)], tmp_path / "maps.png")
        widths.append(matplotlib.image.imread(tmp_path / "maps.png").shape[1])
    assert widths[0] < widths[1] == widths[2]


def test_a_run_keeps_its_maps_and_goes_on_with_them(store: Path, tmp_path: Path) -> None:
    command = ["debug", "--store", str(store), "--out", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--probe-every", "2", "--probe-scans", "4", "--checkpoint-every", "2"]
    assert main([*command, "--iterations", "4"]) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "maps").iterdir())
    assert names == [f"iteration={i:06d}.npz" for i in (1, 2, 4)]
    assert (tmp_path / "run" / "maps.png").is_file()
