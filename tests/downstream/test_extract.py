import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.downstream import extraction
from braindino.downstream.config import ExtractConfig
from braindino.downstream.extract import main
from braindino.downstream.extraction import Work, encode_on, table_meta
from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.catalogue import draw_weights, load_volume_encoder
from braindino.encoders.intensity import IntensityFloor, encode_intensity
from braindino.encoders.volume_transformer import BMMAETransformer
from braindino.feature_table import FeatureTable, FeatureTableWriter
from braindino.leakage import Exposure, exposure_of_encoder, write_exposure
from braindino.manifest import Scan, load_brain, mask_path, read_scans, write_scans
from braindino.parts import part_of
from braindino.slices import axial_slices, uniform_indices
from braindino.transforms import standardize
from braindino.vision_transformer import VisionTransformer
from braindino.volume import save_array, save_mask_like
from braindino.weights import load_encoder, save_encoder

SEQUENCES = ("T1", "FLAIR", "T1c", "T2", "unknown")


pytestmark = pytest.mark.usefixtures("one_thread")


def write_cohort(folder, sequences):
    """Scans of asymmetric noise blobs on a small LPS grid, the first with a brain mask of ours."""
    rng = np.random.default_rng(0)
    affine = np.diag([-3.0, -3.0, 4.0, 1.0])
    scans = []
    for number, sequence in enumerate(sequences):
        data = np.zeros((20, 24, 18), np.float32)
        data[3:15, 4:20, 2:14] = rng.uniform(50, 150, (12, 16, 12))
        data[3:6, 4:8, 2:5] += 200
        path = folder / f"sub-01_{sequence}.nii.gz"
        save_array(data, affine, path, dtype=np.float32)
        scans.append(Scan(str(path), cohort="phantom", subject="01", sequence=sequence, num_slices=number))
    prepared = folder / "prepared"
    (prepared / "masks").mkdir(parents=True)
    mask = np.zeros((20, 24, 18), bool)
    mask[6:16, 5:18, 3:13] = True
    save_mask_like(mask, scans[0].path, mask_path(prepared, scans[0]))
    skipped = Scan("/nowhere/mask.nii.gz", cohort="phantom", subject="01", status="skipped", reason="label_map: a mask")
    write_scans(prepared / "scans.tsv", [*scans, skipped])
    return prepared


@pytest.fixture
def prepared(tmp_path):
    """Two scans."""
    return write_cohort(tmp_path, SEQUENCES[:2])


@pytest.fixture
def five(tmp_path):
    """Five scans, the last of unknown sequence."""
    return write_cohort(tmp_path, SEQUENCES)


@pytest.fixture
def encoder_dir(tmp_path):
    torch.manual_seed(0)
    encoder = VisionTransformer(embed_dim=64, depth=3, num_heads=1, layer_scale_init=1.0).eval()
    save_encoder(encoder, tmp_path / "encoder")
    return tmp_path / "encoder"


def extract(prepared, encoder, out, *more, slices=3):
    options = ["--options", f"num_slices={slices}"] if slices else []
    arguments = ["--prepared", prepared, "--encoder", encoder, "--out", out, "--device", "cpu", *options, *more]
    return main([str(argument) for argument in arguments])


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "scans").iterdir()}


def test_features_equal_the_hand_loop_through_load_standardise_and_encoder(prepared, encoder_dir, tmp_path):
    assert extract(prepared, encoder_dir, tmp_path / "features", "--batch-size", 2) == 0
    table = FeatureTable(tmp_path / "features")
    encoder = load_encoder(encoder_dir)
    assert [scan.sequence for scan in table.scans] == ["FLAIR", "T1"]
    assert table.identity.sha256 == encoder.sha256 and table.dim == 64 and table.meta.num_slices == 3
    assert table.meta.precision == "float32"
    for scan in table.scans:
        slices = axial_slices(standardize(load_brain(prepared, scan)), uniform_indices(3))
        with torch.inference_mode():
            tokens = [encoder(torch.from_numpy(one)[None, None]) for one in slices]
        cls = torch.stack([each.cls[0] for each in tokens]).numpy()
        patches = torch.stack([each.patches[0].mean(dim=0) for each in tokens]).numpy()
        np.testing.assert_allclose(table.slices([scan])[0], cls, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(table.slices([scan], pool="patches")[0], patches, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(table.pooled([scan])[0], cls.mean(axis=0), rtol=1e-5, atol=1e-5)
        upper = table.pooled([scan], pool="cls", slice_range=(0.4, 1.0))
        np.testing.assert_allclose(upper[0], cls[1:].mean(axis=0), rtol=1e-5, atol=1e-5)
    first, second = table.pooled(table.scans)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("name", ["slices", "intensity", "untrained:timm:test_vit"])
def test_the_table_holds_what_direct_calls_of_the_contract_give(prepared, encoder_dir, tmp_path, name):
    name = encoder_dir if name == "slices" else name
    assert extract(prepared, name, tmp_path / "features", "--batch-size", 2) == 0
    table = FeatureTable(tmp_path / "features")
    encoder = load_volume_encoder(name, num_slices=3)
    assert table.identity.key == encoder.identity.key
    for scan in table.scans:
        [features] = encoder.encode([encoder.prepare(load_brain(prepared, scan), sequence=scan.sequence)])
        found = {
            "global": table.pooled([scan]),
            "cls": table.slices([scan]),
            "patches": table.slices([scan], pool="patches"),
            **{depth: table.layer([scan], depth) for depth in ("early", "mid", "late")},
        }
        expected = {"global": features.global_, **features.slices._asdict(), **features.layers._asdict()}
        for key, value in expected.items():
            np.testing.assert_allclose(found[key][0], value.numpy(), rtol=1e-5, atol=1e-5, err_msg=key)


def test_bm_mae_gets_the_sequence_and_a_scan_it_has_no_tokenizer_for_is_a_row(five, tmp_path, monkeypatch):
    """The published size takes minutes, so the door gives a small network, without a tokenizer for T2."""
    network = draw_weights(
        lambda: BMMAETransformer(modalities=("t1", "flair", "t1ce"), width=192, depth=3, mlp_dim=96, grid=4)
    )
    monkeypatch.setattr(
        "braindino.downstream.extract.load_volume_encoder", lambda name, *, device: BMMAE(network, fit="resize")
    )
    out = tmp_path / "features"
    assert extract(five, "bm-mae:small.pth", out, slices=None) == 3
    table = FeatureTable(out)
    assert [scan.sequence for scan in table.scans] == ["FLAIR", "T1", "T1c"]
    assert not table.has_slices and table.dim == 192
    encoder = BMMAE(network, fit="resize")
    for scan in table.scans:
        volume = load_brain(five, scan)
        [features] = encoder.encode([encoder.prepare(volume, sequence=scan.sequence)])
        np.testing.assert_allclose(table.pooled([scan])[0], features.global_.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(table.layer([scan], "mid")[0], features.layers.mid.numpy(), rtol=1e-5, atol=1e-5)
    # The same volume through another tokenizer is another feature: the sequence arrived.
    [other] = encoder.encode([encoder.prepare(load_brain(five, table.scans[0]), sequence="T1")])
    assert np.abs(table.pooled(table.scans[:1])[0] - other.global_.numpy()).max() > 1e-3
    rows = read_scans(out / "quarantined.tsv")
    assert [row.sequence for row in rows] == ["T2", "unknown"]
    assert rows[0].reason == (
        "ValueError: bm-mae: found sequence 'T2'; this file has tokenizers for T1, T1c, FLAIR: "
        "give the sequence of the scan"
    )


def test_features_do_not_depend_on_which_slices_share_a_pass(five, encoder_dir, tmp_path):
    """Three slices a volume: passes of 7 mix two or three volumes."""
    extract(five, encoder_dir, tmp_path / "alone", "--batch-size", 3)
    extract(five, encoder_dir, tmp_path / "mixed", "--batch-size", 7)
    alone, mixed = FeatureTable(tmp_path / "alone"), FeatureTable(tmp_path / "mixed")
    for read in (
        lambda table: table.slices(alone.scans),
        lambda table: table.slices(alone.scans, pool="patches"),
        lambda table: table.layer(alone.scans, "early"),
        lambda table: table.layer(alone.scans, "mid"),
    ):
        expected = read(alone)
        np.testing.assert_allclose(read(mixed), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_second_run_encodes_nothing_again(prepared, tmp_path, capsys):
    assert extract(prepared, "intensity", tmp_path / "features") == 0
    paths = sorted((tmp_path / "features" / "scans").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    assert extract(prepared, "intensity", tmp_path / "features") == 0
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert "0 done in" in capsys.readouterr().out.splitlines()[-1]


def test_a_scan_with_a_newer_mask_is_encoded_again_and_the_other_is_not(prepared, tmp_path):
    extract(prepared, "intensity", tmp_path / "features")
    second, first = FeatureTable(tmp_path / "features").scans
    assert mask_path(prepared, first).exists()
    paths = [tmp_path / "features" / "scans" / f"{scan.scan_id}.safetensors" for scan in (first, second)]
    for path in paths:
        os.utime(path, (2e9, 2e9))
    os.utime(mask_path(prepared, first), (3e9, 3e9))
    extract(prepared, "intensity", tmp_path / "features")
    assert paths[0].stat().st_mtime != 2e9
    assert paths[1].stat().st_mtime == 2e9


def test_a_damaged_file_is_made_again_once_it_is_deleted(prepared, tmp_path):
    extract(prepared, "intensity", tmp_path / "features")
    before = files(tmp_path / "features")
    path = tmp_path / "features" / "scans" / sorted(before)[0]
    path.write_bytes(path.read_bytes()[:-1])
    table = FeatureTable(tmp_path / "features")
    with pytest.raises(ValueError, match=rf"{path.name}: damaged .* delete the file and run extract again"):
        table.pooled(table.scans)
    path.unlink()
    assert extract(prepared, "intensity", tmp_path / "features") == 0
    assert files(tmp_path / "features") == before


def run_and_die(prepared, out, num_before):
    """Extraction whose process is gone, as by SIGKILL, when so many files have been renamed into place."""
    save = extraction.save_features

    def save_or_die(table_dir, meta, scan, features):
        if len(list((out / "scans").glob("[!.]*.safetensors"))) == num_before:
            (out / "scans" / ".tmp-half.safetensors").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save(table_dir, meta, scan, features)

    extraction.save_features = save_or_die
    torch.set_num_threads(1)
    extract(prepared, "intensity", out)


@pytest.mark.fault
@pytest.mark.parametrize("num_before", [1, 3])
def test_a_killed_run_loses_nothing_finished_and_the_next_one_does_the_rest(five, tmp_path, num_before, capsys):
    extract(five, "intensity", tmp_path / "whole")
    out = tmp_path / "features"
    process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(five, out, num_before))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "scans").glob("[!.]*.safetensors")}
    assert len(kept) == num_before
    capsys.readouterr()
    assert extract(five, "intensity", out) == 0
    assert f"{5 - num_before} done in" in capsys.readouterr().out
    assert files(out) == files(tmp_path / "whole")
    assert all((out / "scans" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert FeatureTable(out).scans == FeatureTable(tmp_path / "whole").scans


def test_parts_make_what_one_run_makes(five, tmp_path, capsys):
    extract(five, "intensity", tmp_path / "whole")
    out = tmp_path / "features"
    for part in (1, 2, 3):
        assert extract(five, "intensity", out, "--part", part, "--of", 3) == 0
        assert f"part {part} of 3; when all are done, run once more" in capsys.readouterr().out
        assert not (out / "scans.tsv").exists()
    assert files(out) == files(tmp_path / "whole")
    assert extract(five, "intensity", out) == 0
    assert "0 done in" in capsys.readouterr().out
    assert (out / "scans.tsv").read_bytes() == (tmp_path / "whole" / "scans.tsv").read_bytes()


def test_every_scan_falls_to_one_part():
    scans = [Scan(f"/data/s{number}.nii.gz", "c", f"s{number}") for number in range(300)]
    counts = np.bincount([part_of(scan.scan_id, 3) for scan in scans], minlength=4)
    assert counts[0] == 0 and counts[1:].min() > 70 and counts.sum() == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": 1}, "--part I and --of N belong together"),
        ({"part": 4, "of": 3}, "--part 4 --of 3: expected a part from 1 to 3"),
        ({"batch_size": 0}, "--batch-size: found 0; expected 1 or more"),
        ({"jobs": 0}, "--jobs: found 0; expected 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ExtractConfig(prepared=tmp_path, encoder="intensity", out=tmp_path, **options)


def work_on(prepared, out, encoder_dir):
    encoder = load_volume_encoder(encoder_dir, num_slices=3)
    meta = table_meta(encoder, precision="float32")
    FeatureTableWriter(out, meta)
    return Work(
        encoder=str(encoder_dir),
        options={"num_slices": 3},
        prepared_dir=prepared,
        table_dir=out,
        meta=meta,
        batch_size=None,
        jobs=1,
    )


def test_several_devices_share_the_scans_and_make_what_one_makes(five, encoder_dir, tmp_path):
    """Two processes on the CPU stand for two GPUs; one scan is broken."""
    scans = [scan for scan in read_scans(five / "scans.tsv") if scan.status == "done"]
    extract(five, encoder_dir, tmp_path / "whole")
    (tmp_path / "sub-01_T2.nii.gz").write_bytes(b"broken")
    work = work_on(five, tmp_path / "features", encoder_dir)
    outcome = list(encode_on(["cpu", "cpu"], scans, work))
    assert sorted(scan.scan_id for scan in outcome) == sorted(scan.scan_id for scan in scans)
    assert [scan.sequence for scan in outcome if scan.status == "quarantined"] == ["T2"]
    with FeatureTableWriter(tmp_path / "features", work.meta) as writer:
        assert sum(writer.keep(scan) for scan in scans) == 4
    whole, shared = FeatureTable(tmp_path / "whole"), FeatureTable(tmp_path / "features")
    np.testing.assert_allclose(shared.pooled(shared.scans), whole.pooled(shared.scans), rtol=1e-5, atol=1e-5)


def test_a_process_that_fails_is_named_with_its_device(five, encoder_dir, tmp_path):
    scans = [scan for scan in read_scans(five / "scans.tsv") if scan.status == "done"]
    work = work_on(five, tmp_path / "features", encoder_dir)
    (encoder_dir / "encoder.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"the process for cpu: ValueError: .*encoder\.safetensors"):
        list(encode_on(["cpu"], scans, work))


@pytest.mark.fault
def test_a_process_that_is_killed_is_named_with_its_device(five, encoder_dir, tmp_path):
    def kill():
        wait_for(multiprocessing.active_children)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    scans = [scan for scan in read_scans(five / "scans.tsv") if scan.status == "done"]
    with pytest.raises(ChildProcessError, match=r"the process for cpu ended with code -9, .* the same command goes on"):
        list(encode_on(["cpu"], scans, work_on(five, tmp_path / "features", encoder_dir)))
    killer.join()


def start_and_wait(prepared, out, encoder_dir):
    scans = [scan for scan in read_scans(prepared / "scans.tsv") if scan.status == "done"]
    list(encode_on(["cpu"], scans, work_on(prepared, out, encoder_dir)))


def children_of(pid):
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.fault
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux which processes there are")
def test_the_processes_of_a_killed_run_end_with_it(five, encoder_dir, tmp_path):
    arguments = (five, tmp_path / "features", encoder_dir)
    run = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=arguments)
    run.start()
    wait_for(lambda: children_of(run.pid))
    children = children_of(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    wait_for(lambda: not any(is_alive(pid) for pid in children))
    assert not (tmp_path / "features" / "scans").exists(), "killed before it had started to work"


def is_alive(pid):
    """A zombie that nobody waits for is not."""
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_two_precisions_never_mix_and_differ_by_rounding_only(prepared, encoder_dir, tmp_path, capsys):
    out = tmp_path / "features"
    assert extract(prepared, encoder_dir, out, "--precision", "float32") == 0
    assert extract(prepared, encoder_dir, out, "--precision", "bfloat16") == 1
    assert "holds features computed in float32, asked for bfloat16" in capsys.readouterr().err
    assert extract(prepared, encoder_dir, out, "--precision", "auto") == 0, "on a CPU auto is float32"
    assert extract(prepared, encoder_dir, tmp_path / "half", "--precision", "bfloat16") == 0
    full, half = FeatureTable(out), FeatureTable(tmp_path / "half")
    assert (full.meta.precision, half.meta.precision) == ("float32", "bfloat16")
    assert full.identity == half.identity and full.meta.key != half.meta.key
    exact, rounded = full.pooled(full.scans), half.pooled(full.scans)
    assert 1e-5 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_the_floor_has_nothing_to_compute_in_bfloat16(prepared, tmp_path, capsys):
    assert extract(prepared, "intensity", tmp_path / "features", "--precision", "bfloat16") == 1
    assert "--precision bfloat16: intensity has no network and computes in float32" in capsys.readouterr().err


def test_a_folder_with_features_of_another_encoder_is_refused(prepared, encoder_dir, tmp_path, capsys):
    extract(prepared, "intensity", tmp_path / "features")
    assert extract(prepared, encoder_dir, tmp_path / "features") == 1
    assert "holds features of encoder 'intensity'" in capsys.readouterr().err
    assert extract(prepared, "intensity", tmp_path / "features", slices=4) == 1
    assert "holds features prepared as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_slices", "option 'num_slices': expected name=value"),
        ("num_slices=many", "option 'num_slices=many': expected a whole number"),
        ("colour=red", "option 'colour=red': no encoder has 'colour'; the options are feature, fit"),
        ("fit=resize", "intensity: unknown options fit; this encoder has num_slices"),
        ("num_slices=0", "num: found 0; expected 1 to 256"),
    ],
)
def test_an_option_that_the_encoder_does_not_take_is_refused(prepared, tmp_path, capsys, option, message):
    assert extract(prepared, "intensity", tmp_path / "features", "--options", option, slices=None) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_named(prepared, tmp_path, capsys, device):
    assert extract(prepared, "intensity", tmp_path / "features", "--device", device) == 1
    assert "--device" in capsys.readouterr().err


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


def test_features_that_are_not_finite_are_a_row_and_a_disk_that_is_full_stops_the_run(
    prepared, tmp_path, monkeypatch, capsys
):
    save = extraction.save_features

    def spoil(table_dir, meta, scan, features):
        if scan.sequence == "T1":
            features.global_[0] = torch.inf
        save(table_dir, meta, scan, features)

    monkeypatch.setattr(extraction, "save_features", spoil)
    assert extract(prepared, "intensity", tmp_path / "features") == 3
    (row,) = read_scans(tmp_path / "features" / "quarantined.tsv")
    assert row.sequence == "T1" and "values are not finite: global 1" in row.reason

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extraction, "save_features", full)
    assert extract(prepared, "intensity", tmp_path / "other") == 1
    assert "No space left on device" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_was_encoded_and_says_how_to_go_on(five, tmp_path, monkeypatch, capsys):
    """Ctrl-C during the second call of the encoder, with the files of the first perhaps not written yet."""
    calls = []
    encode = IntensityFloor.encode

    def encode_or_stop(self, prepared, **options):
        calls.append(len(prepared))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, prepared, **options)

    monkeypatch.setattr(IntensityFloor, "encode", encode_or_stop)
    assert extract(five, "intensity", tmp_path / "features", "--batch-size", 3) == 130
    assert "interrupted; what is finished is kept, the same command goes on" in capsys.readouterr().err
    assert calls == [4, 1]
    assert len(files(tmp_path / "features")) == 4
    assert extract(five, "intensity", tmp_path / "features") == 0
    assert "1 done in" in capsys.readouterr().out
    assert len(FeatureTable(tmp_path / "features")) == 5


@pytest.mark.parametrize(
    ("num_slices", "batch_size", "expected"),
    # 128 slices fill passes of 32; four times 127 leave 4 of 512 unused; four or five times 128 would leave 88 or 60 of
    # passes of 100, six times 32 of 800; passes of 256 take two volumes; two passes of 3 volumes, not one and a third.
    [(128, None, 4), (127, 32, 4), (128, 100, 6), (128, 256, 4), (None, None, 4), (None, 3, 6)],
)
def test_a_call_has_few_volumes_that_fill_whole_passes(num_slices, batch_size, expected):
    assert extraction._volumes_per_call(num_slices, batch_size) == expected


@pytest.mark.gpu
def test_all_gpus_make_the_features_of_a_cpu_but_for_rounding(five, encoder_dir, tmp_path):
    extract(five, encoder_dir, tmp_path / "cpu")
    for name, precision in (("exact", "float32"), ("auto", "auto")):
        assert extract(five, encoder_dir, tmp_path / name, "--device", "cuda", "--precision", precision) == 0
    cpu, exact, auto = (FeatureTable(tmp_path / name) for name in ("cpu", "exact", "auto"))
    assert (exact.meta.precision, auto.meta.precision) == ("float32", "bfloat16")
    expected = cpu.slices(cpu.scans)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(exact.slices(cpu.scans), expected, atol=1e-3 * scale)
    np.testing.assert_allclose(auto.slices(cpu.scans), expected, atol=0.1 * scale)


def test_loading_goes_on_while_the_encoder_works_and_writing_does_not_hold_it_up(prepared, tmp_path, monkeypatch):
    """A writer that waits until the encoder is called again would wait for ever if the encoder waited for it."""
    rows = [scan for scan in read_scans(prepared / "scans.tsv") if scan.status == "done"]
    monkeypatch.setattr(extraction, "VOLUMES_PER_CALL", 1)
    encoder = load_volume_encoder("intensity", num_slices=1)
    calls = []
    second_call = threading.Event()
    encode, save = encoder.encode, extraction.save_features

    def count(*arguments, **options):
        calls.append(time.monotonic())
        if len(calls) == 2:
            second_call.set()
        return encode(*arguments, **options)

    def wait(*arguments):
        assert second_call.wait(timeout=60)
        save(*arguments)

    monkeypatch.setattr(encoder, "encode", count)
    monkeypatch.setattr(extraction, "save_features", wait)
    meta = table_meta(encoder, precision="float32")
    work = Work(
        encoder="intensity", options={}, prepared_dir=prepared, table_dir=tmp_path, meta=meta, batch_size=1, jobs=1
    )
    finished = list(extraction.encode_scans(encoder, rows, work))
    assert finished == rows and len(calls) == 2


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
