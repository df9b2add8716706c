"""What a run was pretrained on, written beside its encoder: after exclusions, and with what came before."""

import json
from pathlib import Path

import numpy as np
import pytest

from braindino.audit import main as audit
from braindino.leakage import EXPOSURE_FILE, Exposure, read_exposure, write_exposure
from braindino.manifest import Scan, write_scans
from braindino.pretrain.exposure import record_exposure
from braindino.pretrain.train import main
from braindino.slice_store import SliceStore, SliceStoreWriter


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects with six slices each, in a store and in scans.tsv."""
    folder = tmp_path_factory.mktemp("exposure")
    writer, rng = SliceStoreWriter(folder / "store"), np.random.default_rng(0)
    scans = [
        Scan(f"/data/{n}.nii.gz", "site", f"s{n}", sequence="T1", content_hash=f"{n}" * 32, appearance_hash="")
        for n in range(3)
    ]
    for scan in scans:
        writer.add(scan, rng.standard_normal((6, 256, 256)), range(6))
    writer.publish()
    write_scans(folder / "scans.tsv", scans)
    return folder


def subjects(path: Path) -> list[str]:
    return [scan.subject for scan in read_exposure(path).scans]


def test_an_encoder_whose_run_left_the_test_subjects_out_is_audited_clean(prepared: Path, tmp_path: Path, capsys):
    (tmp_path / "held_out.txt").write_text("site/s1\n")
    flags = ["debug", "--store", str(prepared / "store"), "--device", "cpu", "--iterations", "1", "--batch-size", "4"]
    assert main([*flags, "--out", str(tmp_path / "run"), "--exclude-subjects", str(tmp_path / "held_out.txt")]) == 0
    assert (tmp_path / "run" / "encoder" / EXPOSURE_FILE).exists()
    assert [(scan.subject, scan.content_hash) for scan in read_exposure(tmp_path / "run").scans] == [
        ("s0", "0" * 32),
        ("s2", "2" * 32),
    ]
    (tmp_path / "test.tsv").write_text(f"cohort\tsubject\tcontent_hash\nother\trenamed\t{'1' * 32}\nsite\ts1\t\n")
    assert audit([str(tmp_path / "run" / "encoder"), str(tmp_path / "test.tsv")]) == 0
    # The store holds them all, and so would a run without the list.
    assert audit([str(prepared / "store"), str(tmp_path / "test.tsv")]) == 3
    assert "OVERLAP: 2 of 2 subjects" in capsys.readouterr().out


def test_a_run_with_weights_and_persons_of_two_names_is_audited_clean(tmp_path: Path, capsys):
    writer, rng = SliceStoreWriter(tmp_path / "store"), np.random.default_rng(0)
    ids = [("test", "TCGA-02-0003"), ("tcga-gbm", "TCGA-02-0003-01"), ("tcga-gbm", "TCGA-02-0004"), ("drop", "1")]
    for n, (cohort, subject) in enumerate(ids):
        writer.add(Scan(f"/data/{n}.nii.gz", cohort, subject, sequence="T1"), rng.random((6, 256, 256)), range(6))
    writer.publish()
    (tmp_path / "held_out.txt").write_text("test/TCGA-02-0003\n")
    flags = ["debug", "--store", str(tmp_path / "store"), "--device", "cpu", "--iterations", "1", "--batch-size", "4"]
    flags += ["--out", str(tmp_path / "run"), "--sampling.cohort-weights", "drop=0"]
    assert main([*flags, "--exclude-subjects", str(tmp_path / "held_out.txt")]) == 0
    told = capsys.readouterr().out
    assert "left out with it: tcga-gbm/TCGA-02-0003-01 (same_subject_by_crosswalk as test/TCGA-02-0003, cer" in told
    assert "  drop T1: 6 slices, 0.0% of the draws (left out)" in told
    assert subjects(tmp_path / "run") == ["TCGA-02-0004"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["excluded_subjects"]["subjects"] == ["tcga-gbm/TCGA-02-0003-01", "test/TCGA-02-0003"]
    assert list(record["excluded_subjects"]["joined"]) == ["tcga-gbm/TCGA-02-0003-01"]
    assert "drop=0" in (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "test.tsv").write_text("cohort\tsubject\ntest\tTCGA-02-0003\ndrop\t1\n")
    assert audit([str(tmp_path / "run" / "encoder"), str(tmp_path / "test.tsv")]) == 0
    assert audit([str(tmp_path / "store"), str(tmp_path / "test.tsv")]) == 3
    # Other weights are other data: the run is not resumed with them.
    flags[-1] = "drop=1"
    assert main([*flags, "--exclude-subjects", str(tmp_path / "held_out.txt")]) == 1
    assert "sampling.cohort_weights: ['drop=0'] -> ['drop=1']" in capsys.readouterr().err


def test_a_second_stage_has_seen_what_the_first_has(prepared: Path, tmp_path: Path):
    store = SliceStore(prepared / "store")
    first, second = tmp_path / "first" / "encoder", tmp_path / "second" / "encoder"
    only_s0 = np.arange(0, 6)
    only_s2 = np.arange(12, 18)
    record_exposure(first, store, only_s0, init_from=None, resumed=False)
    record_exposure(second, store, only_s2, init_from=tmp_path / "first", resumed=False)
    assert (subjects(first), subjects(second)) == (["s0"], ["s0", "s2"])
    # Resumed after the first run was deleted: the table stands.
    (first / EXPOSURE_FILE).unlink()
    record_exposure(second, store, only_s2, init_from=tmp_path / "first", resumed=True)
    assert subjects(second) == ["s0", "s2"]
    # Started anew, what the first has seen is unknown, and unknown stays so from stage to stage.
    record_exposure(second, store, only_s2, init_from=tmp_path / "first", resumed=False)
    third = tmp_path / "third" / "encoder"
    record_exposure(third, store, only_s0, init_from=tmp_path / "second", resumed=False)
    assert subjects(third) == ["s0", "s2"]
    assert read_exposure(third).unknown == (f"the run starts from first, which has no {EXPOSURE_FILE}",)


def test_an_older_table_is_replaced_by_a_run_that_starts_over(prepared: Path, tmp_path: Path):
    write_exposure(tmp_path / EXPOSURE_FILE, Exposure((Scan("", "old", "1"),)))
    store = SliceStore(prepared / "store")
    record_exposure(tmp_path, store, np.arange(len(store)), init_from=None, resumed=False)
    assert subjects(tmp_path) == ["s0", "s1", "s2"]
