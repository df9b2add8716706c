"""``braindino represent`` on feature tables of known geometry."""

import json

import numpy as np
import pytest
import torch

from braindino.downstream.cka import align, linear_cka
from braindino.downstream.represent import main
from braindino.downstream.spread import measure_spread
from braindino.encoders.contract import Features, Identity, Layers, SliceFeatures
from braindino.feature_table import DEPTHS, FeatureTableMeta, FeatureTableWriter
from braindino.manifest import Scan, read_scans
from braindino.representation_tables import read_cka, read_cohort_share, read_neighbours, read_spread

NUM_SLICES = 3
SEQUENCES = ("T1", "T2")


def make_scans(*, cohorts=("east", "west"), subjects=8):
    return [
        Scan(f"/data/{cohort}/{number}_{sequence}.nii.gz", cohort, f"s{number:02}", "", sequence)
        for cohort in cohorts
        for number in range(subjects)
        for sequence in SEQUENCES
    ]


def write_table(folder, scans, depths, slices=None):
    """``depths``: early, mid, late, global -> (n, D); ``slices`` (n, S, D) for an encoder of slices."""
    identity = Identity(folder.name, folder.name * 8, {}, {"feature": "cls"})
    dim = depths["global"].shape[1]
    with FeatureTableWriter(folder, FeatureTableMeta(identity, "float32", dim, slices and NUM_SLICES)) as writer:
        for row, scan in enumerate(scans):
            tensors = {name: torch.as_tensor(values[row], dtype=torch.float32) for name, values in depths.items()}
            cls = None if slices is None else torch.as_tensor(slices[row], dtype=torch.float32)
            writer.add(
                scan,
                Features(
                    tensors["global"],
                    Layers(*(tensors[depth] for depth in DEPTHS)),
                    None,
                    None if cls is None else SliceFeatures(cls, cls),
                ),
            )


@pytest.fixture
def tables(tmp_path):
    """Encoder `first` of slices; `turned` is its rotation early, half of it in the middle, and unrelated late."""
    rng = np.random.default_rng(0)
    scans = make_scans()
    values = {depth: rng.standard_normal((len(scans), 6)) for depth in (*DEPTHS, "global")}
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    other = {
        "early": 3 * values["early"] @ turn,
        "mid": np.hstack([values["mid"][:, :3], rng.standard_normal((len(scans), 4))]),
        "late": rng.standard_normal((len(scans), 9)),
        "global": rng.standard_normal((len(scans), 5)),
    }
    slices = [rng.standard_normal((NUM_SLICES, 6)) for _ in scans]
    write_table(tmp_path / "first", scans, values, slices)
    write_table(tmp_path / "turned", scans, other)
    return tmp_path, scans, values, other, slices


def represent(root, *arguments, encoders=("first", "turned"), out="out"):
    return main(["--features", *(str(root / name) for name in encoders), "--out", str(root / out), *arguments])


def test_alignments_are_those_of_the_features_by_scan_and_by_subject(tables):
    root, scans, values, other, _ = tables
    assert represent(root) == 0
    rows = read_cka(root / "out" / "cka.tsv")
    keys = [(row.group, row.unit, row.depth) for row in rows]
    groups = ("east", "west", "all")
    assert keys == [(group, unit, depth) for group in groups for unit in ("scan", "subject") for depth in DEPTHS]
    assert {(row.encoder_a, row.encoder_b, row.dim_a) for row in rows} == {("first", "turned", 6)}
    subjects = np.array([scan.subject_key for scan in scans])
    for row in rows:
        kept = np.array([row.group in (scan.cohort, "all") for scan in scans])
        x, y = values[row.depth][kept], other[row.depth][kept]
        names = subjects[kept]
        if row.unit == "subject":
            x, y = (each.reshape(-1, 2, each.shape[1]).mean(axis=1) for each in (x, y))
            names = names[::2]
        found = align(x.astype(np.float32), y.astype(np.float32), names)
        assert row.cka == pytest.approx(linear_cka(x, y), abs=2e-6)
        assert (row.n, row.subjects, row.dim_b) == (len(x), len(set(names)), y.shape[1])
        told = [row.low, row.high, row.debiased, row.debiased_low, row.debiased_high]
        np.testing.assert_allclose(told, found[1:6], atol=2e-5)
        assert row.depth != "early" or row.cka == pytest.approx(1)


def test_spread_is_told_of_every_encoder_group_and_depth(tables):
    root, scans, values, _, _ = tables
    assert represent(root) == 0
    rows = read_spread(root / "out" / "spread.tsv")
    assert len(rows) == 3 * 2 * 4
    [row] = [row for row in rows if (row.group, row.encoder, row.depth) == ("west", "first", "global")]
    expected = measure_spread(values["global"][16:], [scan.subject_key for scan in scans[16:]])
    told = [getattr(row, name) for name in expected._fields]
    np.testing.assert_allclose(told, expected, rtol=1e-4)
    assert (row.n, row.subjects, row.dim) == (16, 8, 6)


def test_scans_near_those_of_their_own_cohort_are_beside_chance(tmp_path):
    scans = make_scans(subjects=6)
    rng = np.random.default_rng(1)
    site = np.array([[10.0, 0] if scan.cohort == "east" else [0, 10.0] for scan in scans])
    knows = site + 0.1 * rng.standard_normal((24, 2))
    knows[0] = knows[12]  # one scan of the east looks like the west
    for name, features in (("knows", knows), ("blind", rng.standard_normal((24, 2)))):
        write_table(tmp_path / name, scans, dict.fromkeys((*DEPTHS, "global"), features))
    assert represent(tmp_path, "--neighbours", "4", encoders=("knows", "blind")) == 0
    rows = read_cohort_share(tmp_path / "out" / "cohort_share.tsv")
    found = {(row.encoder, row.bank, row.cohort): row for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 3
    east, west = found["knows", "all", "east"], found["knows", "all", "west"]
    # 10 scans of 5 other subjects in the own cohort, 12 in the other.
    assert east.chance == west.chance == pytest.approx(10 / 22, abs=1e-6)
    assert (east.n, east.subjects, east.k) == (12, 6, 4)
    assert east.share == pytest.approx(11 / 12, abs=1e-5)  # all four of eleven scans, none of the twelfth
    assert east.low < east.share < east.high
    same = found["knows", "same sequence", "all"]
    assert same.chance == pytest.approx(5 / 11, abs=1e-5) and same.n == 24
    blind = found["blind", "all", "all"]
    assert blind.low < blind.chance < blind.high < same.low


def test_with_one_sequence_there_is_one_bank(tables):
    root, *_ = tables
    assert represent(root, "--sequences", "T1", "--neighbours", "3") == 0
    assert {row.bank for row in read_cohort_share(root / "out" / "cohort_share.tsv")} == {"all"}


def test_the_neighbours_of_scans_and_slices_are_listed(tables, capsys):
    root, scans, values, _, slices = tables
    query, other = scans[4], scans[20]
    arguments = ["--queries", query.path, f"{other.scan_id}:1", "--neighbours", "3"]
    assert represent(root, *arguments) == 0
    assert "turned reads whole volumes, so 1 queries of slices are left out for it" in capsys.readouterr().out
    rows = read_neighbours(root / "out" / "neighbours.tsv")
    kinds = [(row.encoder, row.query, row.query_slice, row.among) for row in rows[::3]]
    among = ("all cohorts", "other cohorts")
    assert kinds == [
        *(("first", query.scan_id, "all", each) for each in among),
        *(("first", other.scan_id, "1", each) for each in among),
        *(("turned", query.scan_id, "all", each) for each in among),
    ]
    assert [row.rank for row in rows[:3]] == [1, 2, 3]
    unit = np.array(values["global"]) / np.linalg.norm(values["global"], axis=1, keepdims=True)
    candidates = [n for n, scan in enumerate(scans) if scan.subject_key != query.subject_key]
    nearest = max(candidates, key=lambda n: unit[n] @ unit[4])
    assert rows[0].scan == scans[nearest].scan_id and rows[0].path == scans[nearest].path
    assert rows[0].similarity == pytest.approx(unit[nearest] @ unit[4], abs=1e-5)
    assert all(row.cohort != query.cohort for row in rows if row.among == "other cohorts" and row.query_slice == "all")
    [first, *_] = [row for row in rows if row.query_slice == "1"]
    flat = np.array(slices)
    flat /= np.linalg.norm(flat, axis=2, keepdims=True)
    cosines = flat @ flat[20, 1]
    cosines[20:22] = -2
    place = np.unravel_index(cosines.argmax(), cosines.shape)
    assert (first.scan, first.slice) == (scans[place[0]].scan_id, str(place[1]))


def test_without_queries_the_first_scan_of_each_cohort_is_asked(tables):
    root, scans, *_ = tables
    assert represent(root) == 0
    rows = read_neighbours(root / "out" / "neighbours.tsv")
    assert {row.query for row in rows} == {scans[0].scan_id, scans[16].scan_id}
    assert {row.query_slice for row in rows} == {row.slice for row in rows} == {"all"}


def test_the_subset_is_the_first_scans_of_each_cohort_of_the_sequences(tables):
    root, scans, values, other, _ = tables
    assert represent(root, "--per-cohort", "5", "--sequences", "T2") == 0
    used = read_scans(root / "out" / "scans.tsv")
    assert [scan.path for scan in used] == [scans[row].path for row in (1, 3, 5, 7, 9, 17, 19, 21, 23, 25)]
    rows = read_cka(root / "out" / "cka.tsv")
    assert {row.unit for row in rows} == {"scan"}, "with one scan a subject both units are the same"
    [row] = [row for row in rows if (row.group, row.depth) == ("east", "mid")]
    assert row.cka == pytest.approx(linear_cka(values["mid"][1:10:2], other["mid"][1:10:2]), abs=2e-6)
    assert represent(root, "--per-cohort", "0", out="everything") == 0
    assert len(read_scans(root / "everything" / "scans.tsv")) == len(scans)


def test_only_scans_that_all_encoders_have_are_compared(tables, capsys):
    root, scans, _, other, _ = tables
    write_table(root / "some", scans[2:], {depth: each[2:] for depth, each in other.items()})
    assert represent(root, encoders=("first", "some")) == 0
    assert "represent: 2 scans of first are left out: not all encoders have them" in capsys.readouterr().out
    assert len(read_scans(root / "out" / "scans.tsv")) == 30


def test_a_cohort_of_few_subjects_counts_in_all_together_alone(tmp_path, capsys):
    scans = make_scans() + make_scans(cohorts=("small",), subjects=3)
    features = np.random.default_rng(2).standard_normal((len(scans), 4))
    write_table(tmp_path / "one", scans, dict.fromkeys((*DEPTHS, "global"), features))
    assert represent(tmp_path, encoders=("one",)) == 0
    assert "no group of its own: small, 3 subject(s); 4 are needed" in capsys.readouterr().out
    assert {row.group for row in read_spread(tmp_path / "out" / "spread.tsv")} == {"east", "west", "all"}
    assert read_cka(tmp_path / "out" / "cka.tsv") == []
    few = make_scans(cohorts=("few",), subjects=3)
    write_table(tmp_path / "two", few, dict.fromkeys((*DEPTHS, "global"), features[:6]))
    assert represent(tmp_path, encoders=("two",), out="none") == 1
    assert "6 scans of 3 subjects; expected 4 subjects or more of one cohort" in capsys.readouterr().err


def test_results_of_other_settings_are_replaced_on_demand_only(tables, capsys):
    root, *_ = tables
    assert represent(root) == 0
    run = json.loads((root / "out" / "run.json").read_text())
    assert run["settings"]["per_cohort"] == 1000 and set(run["encoders"]) == {"first", "turned"}
    assert run["provenance"]["command"][:2] == ["braindino", "represent"] and run["num_scans"] == 32
    before = (root / "out" / "cka.tsv").read_bytes()
    assert represent(root) == 0, "the same again"
    assert (root / "out" / "cka.tsv").read_bytes() == before
    assert represent(root, "--per-cohort", "10") == 1
    assert "holds results of other settings, encoders, scans_sha256; choose another --out" in capsys.readouterr().err
    assert (root / "out" / "cka.tsv").read_bytes() == before
    assert represent(root, "--per-cohort", "10", "--replace") == 0
    assert (root / "out" / "cka.tsv").read_bytes() != before


def test_a_run_that_is_stopped_leaves_no_numbers_of_other_settings(tables, monkeypatch):
    root, *_ = tables
    assert represent(root) == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("braindino.downstream.represent.spread_rows", stop)
    assert represent(root, "--per-cohort", "10", "--replace") == 130
    assert sorted(path.name for path in (root / "out").iterdir()) == ["run.json", "scans.tsv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--queries", "/data/nobody.nii.gz"],
            "found '/data/nobody.nii.gz'; expected a path of scans.tsv or a scan id",
        ),
        (["--queries", "/data/east/0_T1.nii.gz:3"], "the tables have features of slices 0 to 2"),
        (["--queries", "/data/east/0_T1.nii.gz:x"], "expected a path of scans.tsv or a scan id"),
        (["--sequences", "T1c"], "no scan of sequence T1c is in all tables; found T1, T2"),
    ],
)
def test_what_cannot_be_done_is_said(tables, capsys, arguments, message):
    assert represent(tables[0], *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tables[0] / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--per-cohort", "-1"), ("--neighbours", "0")])
def test_a_number_out_of_range_is_an_error_of_usage(tables, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        represent(tables[0], option, value)
    assert f"{option}: found {value}; expected" in capsys.readouterr().err


def test_slices_of_encoders_of_volumes_are_not_asked_for(tables, capsys):
    root, scans, *_ = tables
    assert represent(root, "--queries", f"{scans[0].path}:0", encoders=("turned",)) == 1
    assert "the tables have no features of slices" in capsys.readouterr().err


def test_a_cohort_cannot_bear_the_name_of_all_of_them(tmp_path, capsys):
    scans = make_scans(cohorts=("all",))
    features = np.random.default_rng(3).standard_normal((len(scans), 4))
    write_table(tmp_path / "one", scans, dict.fromkeys((*DEPTHS, "global"), features))
    assert represent(tmp_path, encoders=("one",)) == 1
    assert "a cohort is called 'all'" in capsys.readouterr().err


def test_a_group_whose_matrices_would_not_fit_into_memory_is_refused(tables, capsys, monkeypatch):
    monkeypatch.setattr("braindino.downstream.representation.MAX_SCANS", 31)
    assert represent(tables[0]) == 1
    assert "32 scans in group all; alignments are made of at most 31" in capsys.readouterr().err
