import csv
import json

import numpy as np
import pytest
import torch

from braindino.downstream import evaluate, reproduce
from braindino.downstream.results import data_note
from braindino.downstream.task_table import load_task, task_names
from braindino.encoders.contract import Features, Identity, Layers, SliceFeatures
from braindino.feature_table import FeatureTableMeta, FeatureTableWriter
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import SEQUENCES, Scan

NUM_SLICES = 4


def write_features(folder, features_of, *, with_slices=True):
    """A feature table of scans -> (S, D) slices."""
    first = next(iter(features_of.values()))
    identity = Identity(folder.name, folder.name * 8, {"num_slices": NUM_SLICES}, {"feature": "cls"})
    meta = FeatureTableMeta(identity, "float32", first.shape[1], len(first) if with_slices else None)
    with FeatureTableWriter(folder, meta) as writer:
        for scan, slices in features_of.items():
            cls = torch.as_tensor(slices, dtype=torch.float32)
            mean = cls.mean(dim=0)
            # Patch means are told apart from CLS tokens by their sign.
            kept = SliceFeatures(cls, -cls) if with_slices else None
            writer.add(scan, Features(mean, Layers(mean, mean, mean), None, kept))


@pytest.fixture
def cohort(tmp_path):
    """20 subjects with four sequences; `good` tells the sequence and the age, `noise` nothing."""
    rng = np.random.default_rng(0)
    age = {f"{number:02d}": 20.0 + 3 * number for number in range(20)}
    lines = [f"sub-{subject}\t{years}" for subject, years in age.items()]
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\tage", *lines, ""]))
    for name in ("good", "noise"):
        features = {}
        for subject, years in age.items():
            for index, sequence in enumerate(SEQUENCES):
                feature = rng.standard_normal(6) * (0.05 if name == "good" else 1.0)
                if name == "good":
                    feature[index] += 3.0
                    feature[4] += (years - 50) / 20
                scan = Scan(f"/data/{subject}_{sequence}.nii.gz", "c", subject, "", sequence)
                features[scan] = np.stack([feature] * NUM_SLICES)
        write_features(tmp_path / name, features)
    return tmp_path


def run(cohort, task, *more, encoders=("good", "noise")):
    """`braindino evaluate`; tasks of the table with a small head that learns in a moment."""
    if task in task_names() and load_task(task).knn is None:
        quick = cohort / "quick" / f"{task}.yaml"
        quick.parent.mkdir(exist_ok=True)
        quick.write_text(
            f"extends: {task}\nhead: {{hidden_width: 32}}\ntraining: {{steps: 150, learning_rate: 5.0e-3}}\n"
        )
        task = quick
    features = [str(cohort / name) for name in encoders]
    out = ["--out", str(cohort / "eval"), "--device", "cpu", "--permutations", "0"]
    return evaluate.main([str(task), "--features", *features, *out, *map(str, more)])


def read(path, delimiter="\t"):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle, delimiter=delimiter))


def summary(cohort, task):
    return read(cohort / "eval" / task / "summary.tsv")


def predictions(cohort, task, encoder):
    return read(cohort / "eval" / task / encoder / "predictions.csv", ",")


def splits(cohort, task):
    return json.loads((cohort / "eval" / task / "splits.json").read_text())


def test_the_sequence_task_finds_the_encoder_that_knows_and_the_one_that_does_not(cohort, capsys):
    assert run(cohort, "sequence", "--ratios", 0.3, 1.0, "--seeds", 0, 1, "--test-fraction", 0.3) == 0
    rows = {(row["encoder"], row["ratio"], row["metric"]): row for row in summary(cohort, "sequence")}
    assert len(rows) == 2 * 2 * 2
    good, noise = rows["good", "1", "accuracy"], rows["noise", "1", "accuracy"]
    assert (good["estimate"], good["low"], good["high"]) == ("1.000", "1.000", "1.000")
    assert (good["baseline"], good["baseline_name"]) == ("0.250", "majority class")
    assert float(noise["low"]) < 0.45 and float(noise["estimate"]) < 0.5
    auc = rows["noise", "1", "macro_auc"]
    assert float(auc["low"]) < 0.5 < float(auc["high"]) or abs(float(auc["estimate"]) - 0.5) < 0.1
    assert (auc["baseline"], auc["baseline_name"]) == ("0.500", "chance")
    assert (rows["good", "0.3", "accuracy"]["train_subjects"], good["train_subjects"]) == ("4", "14")
    (difference,) = [r for r in read(cohort / "eval" / "sequence" / "comparisons.tsv") if r["ratio"] == "1"]
    assert float(difference["low"]) > 0.4 and difference["p_holm"] == "<0.0005"
    assert difference["method"].startswith("paired 95 % percentile bootstrap over subjects")
    assert "good - noise" in capsys.readouterr().out


def test_the_folder_tells_who_was_tested_on_and_where_the_numbers_come_from(cohort):
    assert run(cohort, "sequence", "--ratios", 0.5, 1.0, "--seeds", 3, "--test-fraction", 0.3, encoders=["good"]) == 0
    about = json.loads((cohort / "eval" / "sequence" / "run.json").read_text())
    found = splits(cohort, "sequence")
    (split,) = found["splits"]
    half, full = (set(job["train"]) for job in found["jobs"])
    assert len(split["train"]) == 14 and len(split["test"]) == 6 and not set(split["train"]) & set(split["test"])
    assert half < full == set(split["train"])
    rows = [row for row in predictions(cohort, "sequence", "good") if row["ratio"] == "1"]
    assert {row["subject"] for row in rows} == set(split["test"]) and len(rows) == 24
    hand = np.mean([row["target"] == row["predicted"] for row in rows])
    (entry,) = [r for r in summary(cohort, "sequence") if r["ratio"] == "1" and r["metric"] == "accuracy"]
    assert float(entry["estimate"]) == pytest.approx(hand)
    assert (entry["test_subjects"], entry["train_subjects"]) == ("6", "14")
    assert "bootstrap over subjects" in entry["interval"]
    assert about["encoders"]["good"]["identity"]["sha256"] == "good" * 8
    assert about["provenance"]["command"][:2] == ["braindino", "evaluate"]
    assert {"torch", "numpy", "python"} <= set(about["provenance"]["versions"])
    assert about["task"]["section"] == "4.3.6" and about["num_cases"] == 80


def test_brain_age_uses_t1_only_and_stands_beside_the_training_mean(cohort, capsys):
    arguments = ("--ratios", 1.0, "--seeds", 0, "--labels", cohort, "--test-fraction", 0.3)
    assert run(cohort, "brain_age", *arguments) == 0
    rows = {(row["encoder"], row["metric"]): row for row in summary(cohort, "brain_age")}
    good, noise = rows["good", "mae (years)"], rows["noise", "mae (years)"]
    assert good["baseline_name"] == "training mean"
    assert float(good["high"]) < float(good["baseline_low"])
    assert float(noise["high"]) > float(noise["baseline_low"])
    assert float(rows["good", "r2"]["estimate"]) > 0.8
    out = capsys.readouterr().out
    assert "20 cases of 20 subjects" in out and "left out: 20, sequence FLAIR" in out
    (test,) = [row for row in read(cohort / "eval" / "brain_age" / "comparisons.tsv") if not row["stratum"]]
    assert test["what"] == "absolute error" and test["method"].startswith("paired t test over subjects")
    strata = {row["stratum"] for row in read(cohort / "eval" / "brain_age" / "strata.tsv")}
    assert strata <= {"10-29", "30-49", "50-69", "70+"} and len(strata) > 1
    within = [row for row in read(cohort / "eval" / "brain_age" / "comparisons.tsv") if row["stratum"]]
    assert within and all(row["method"].startswith("sign-flip test") for row in within)
    (line, _) = read(cohort / "eval" / "brain_age" / "calibration.tsv")
    assert 0.7 < float(line["slope"]) < 1.2


def test_knn_leaves_out_neighbourhoods_larger_than_the_bank_and_compares_by_mcnemar(cohort, capsys):
    arguments = ("--ratios", 0.1, 1.0, "--seeds", 0, "--test-fraction", 0.3)
    assert run(cohort, "knn_sequence", *arguments) == 0
    variants = [(row["ratio"], row["variant"]) for row in summary(cohort, "knn_sequence") if row["encoder"] == "good"]
    assert [variant for ratio, variant in variants if ratio == "0.1"] == ["k=1", "k=3"]
    assert [variant for ratio, variant in variants if ratio == "1"] == ["k=1", "k=3", "k=5", "k=10", "k=20", "k=50"]
    assert "ratio 0.1: left out k = 5, 10, 20, 50, larger than the memory bank" in capsys.readouterr().out
    tests = [row for row in read(cohort / "eval" / "knn_sequence" / "comparisons.tsv") if row["ratio"] == "1"]
    assert len(tests) == 6 and all(row["method"].startswith("exact McNemar") for row in tests)
    # Holm over the six neighbourhoods (paper sec. 4.6): the smallest p is multiplied by six.
    smallest = min(tests, key=lambda row: float(row["p"]))
    assert float(smallest["p_holm"]) == pytest.approx(min(1, 6 * float(smallest["p"])), rel=0.1)


def test_a_list_of_test_subjects_fixes_the_test_set(cohort):
    (cohort / "held_out.txt").write_text("# held out\nc/00\nc/07\nother/99\n")
    arguments = ("--ratios", 1.0, "--seeds", 0, 1, "--test-subjects", cohort / "held_out.txt")
    assert run(cohort, "sequence", *arguments, encoders=["good"]) == 0
    found = splits(cohort, "sequence")
    assert found["splits"][0]["test"] == ["c/00", "c/07"] and len(found["splits"][0]["train"]) == 18
    assert [job["seed"] for job in found["jobs"]] == [0, 1]


def test_repeated_splits_give_a_t_interval_over_splits_and_two_t_tests(cohort):
    arguments = ("--ratios", 1.0, "--seeds", 0, "--protocol", "repeated", "--num-splits", 4, "--test-fraction", 0.3)
    assert run(cohort, "sequence", *arguments) == 0
    row = next(r for r in summary(cohort, "sequence") if r["encoder"] == "noise" and r["metric"] == "accuracy")
    by_split = {}
    for each in predictions(cohort, "sequence", "noise"):
        by_split.setdefault(each["split"], []).append(each["target"] == each["predicted"])
    values = [np.mean(hits) for hits in by_split.values()]
    half = 3.182446305284263 * np.std(values, ddof=1) / 2  # Student's t, 0.975, 3 degrees of freedom
    assert [float(row[k]) for k in ("estimate", "low", "high")] == pytest.approx(
        [np.mean(values), np.mean(values) - half, np.mean(values) + half], abs=6e-4
    )
    assert row["splits"] == "4" and "over splits" in row["interval"]
    methods = [r["method"] for r in read(cohort / "eval" / "sequence" / "comparisons.tsv")]
    assert methods[0].startswith("paired t test over splits") and methods[1].startswith("corrected resampled t test")


def test_k_folds_test_every_subject_once(cohort):
    arguments = ("--ratios", 1.0, "--seeds", 0, "--protocol", "kfold", "--num-splits", 5)
    assert run(cohort, "sequence", *arguments, encoders=["good"]) == 0
    tested = [subject for split in splits(cohort, "sequence")["splits"] for subject in split["test"]]
    assert sorted(tested) == [f"c/{number:02d}" for number in range(20)]
    assert {len(split["test"]) for split in splits(cohort, "sequence")["splits"]} == {4}


def test_dividing_by_scan_needs_a_flag_and_marks_every_number(cohort, capsys):
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 0, "--split-by-scan", encoders=["good"]) == 0
    assert {row["warnings"] for row in summary(cohort, "sequence")} == {
        "DIVIDED BY SCAN: subjects are trained and tested on"
    }
    (split,) = splits(cohort, "sequence")["splits"]
    assert len(split["train"]) + len(split["test"]) == 80
    assert "warning: DIVIDED BY SCAN" in capsys.readouterr().out


def test_encoders_are_compared_on_the_scans_that_all_of_them_have(cohort, capsys):
    scans = [Scan(f"/data/{n:02d}_{s}.nii.gz", "c", f"{n:02d}", "", s) for n in range(6) for s in SEQUENCES[:2]]
    write_features(cohort / "part", {scan: np.ones((NUM_SLICES, 3)) for scan in scans})
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 0, encoders=["good", "part"]) == 0
    out = capsys.readouterr().out
    assert "68 scans of good are left out: not all encoders have them" in out
    assert "12 cases of 6 subjects" in out


def test_permuted_labels_show_whether_the_labels_make_the_score(cohort):
    arguments = ("--ratios", 0.5, 1.0, "--seeds", 0, "--test-fraction", 0.3, "--permutations", 9)
    assert run(cohort, "sequence", *arguments) == 0
    rows = {(r["encoder"], r["ratio"], r["metric"]): r["permutation_p"] for r in summary(cohort, "sequence")}
    assert rows["good", "1", "accuracy"] == "0.1"  # better than all nine: (1 + 0) / (1 + 9)
    assert float(rows["noise", "1", "accuracy"]) > 0.1
    assert rows["good", "0.5", "accuracy"] == rows["good", "1", "macro_auc"] == "n/a"


def test_a_run_is_reproduced_and_a_changed_one_is_not(cohort, capsys):
    arguments = ("--ratios", 0.5, 1.0, "--seeds", 0, 1, "--labels", cohort, "--permutations", 2)
    assert run(cohort, "brain_age", *arguments) == 0
    folder = cohort / "eval" / "brain_age"
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert reproduce.main([str(folder), "--device", "cpu"]) == 0
    assert "every prediction and every number is the same" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before

    table = folder / "good" / "predictions.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[lines[0].split(",").index("predicted")] = "1"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:], ""]))
    assert reproduce.main([str(folder), "--device", "cpu"]) == 4
    assert "different: good: predictions by up to" in capsys.readouterr().out

    (cohort / "good").rename(cohort / "moved")
    assert reproduce.main([str(folder), "--device", "cpu"]) == 1
    assert "no features.json here" in capsys.readouterr().err
    table.write_text("\n".join([*lines, ""]))
    assert reproduce.main([str(folder), "--device", "cpu", "--features", f"good={cohort / 'moved'}"]) == 0
    assert reproduce.main([str(folder), "--device", "cpu", "--features", f"good={cohort / 'noise'}"]) == 1
    assert "other features than the run used (encoder good)" in capsys.readouterr().err


def test_results_of_other_settings_are_not_replaced_unasked(cohort, capsys):
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 0, encoders=["good"]) == 0
    first = (cohort / "eval" / "sequence" / "summary.tsv").read_bytes()
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 0, encoders=["good"]) == 0
    assert (cohort / "eval" / "sequence" / "summary.tsv").read_bytes() == first
    capsys.readouterr()
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 1, encoders=["good"]) == 1
    assert "holds results of other settings; choose another --out, or give --replace" in capsys.readouterr().err
    assert (cohort / "eval" / "sequence" / "summary.tsv").read_bytes() == first
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 1, "--replace", encoders=["good"]) == 0


def test_a_replacement_that_is_stopped_leaves_no_numbers_of_other_settings(cohort, monkeypatch):
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 0) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run_sweep", stop)
    assert run(cohort, "sequence", "--ratios", 1.0, "--seeds", 1, "--replace", encoders=["good"]) == 130
    folder = cohort / "eval" / "sequence"
    assert json.loads((folder / "run.json").read_text())["settings"]["seeds"] == [1]
    assert not (folder / "summary.tsv").exists() and not list(folder.glob("*/predictions.csv"))


def test_a_task_of_ones_own_is_a_yaml_file(cohort):
    path = cohort / "old.yaml"
    path.write_text(
        "title: Older than fifty\ninputs: {sequences: [T1]}\nmetrics: [auc]\nclinical: [age]\n"
        'target: {kind: class, column: old, classes: ["0", "1"]}\ntraining: {loss: cross_entropy}\n'
    )
    lines = [f"{n:02d}\t{20 + 3 * n}\t{int(20 + 3 * n > 50)}" for n in range(20)]
    (cohort / "labels.tsv").write_text("\n".join(["subject\tage\told", *lines, ""]))
    assert run(cohort, path, "--labels", cohort / "labels.tsv", "--ratios", 1.0, "--seeds", 0) == 0
    good, noise = summary(cohort, "old")
    assert float(good["estimate"]) > 0.9 and good["metric"] == "auc"
    assert good["clinical"] == "1.000"  # the age decides
    assert noise["clinical"] == "1.000"


def survival_cohort(tmp_path, *, censor=0.2):
    """60 patients with four sequences each (T2 of every third is missing); risk is in the first feature of T1c."""
    rng = np.random.default_rng(1)
    lines, features = ["subject\tos_days\tdeath\tdeath_within_365_days\tage_years"], {}
    for number in range(60):
        risk = rng.standard_normal()
        days = np.clip(400 * np.exp(-1.5 * risk) * rng.exponential(), 5, 9000)
        dead = int(rng.random() > censor)
        within = "n/a" if days <= 365 and not dead else int(days <= 365)
        lines.append(f"P{number:02d}\t{days:.0f}\t{dead}\t{within}\t{60 + 5 * risk + rng.standard_normal():.1f}")
        for sequence in SEQUENCES:
            if sequence == "T2" and number % 3 == 0:
                continue
            feature = 0.1 * rng.standard_normal(6)
            feature[0] += risk * (4.0 if sequence == "T1c" else 0.0)
            features[Scan(f"/{number:02d}_{sequence}.nii", "upenn-gbm", f"P{number:02d}", "11", sequence)] = np.stack(
                [feature] * NUM_SLICES
            )
    (tmp_path / "clinical.tsv").write_text("\n".join([*lines, ""]))
    write_features(tmp_path / "good", features)
    rng = np.random.default_rng(2)
    write_features(tmp_path / "noise", {scan: rng.standard_normal((NUM_SLICES, 6)) for scan in features})
    return tmp_path


def test_survival_orders_patients_and_stands_beside_cox_on_age(tmp_path, capsys):
    cohort = survival_cohort(tmp_path)
    arguments = ("--labels", cohort / "clinical.tsv", "--ratios", 1.0, "--seeds", 0, 1, "--test-fraction", 0.4)
    assert run(cohort, "os_cox", *arguments) == 0
    # Complete sets of sequences only, as in the paper.
    assert "40 cases of 40 subjects, 160 scans" in capsys.readouterr().out
    rows = {row["encoder"]: row for row in summary(cohort, "os_cox")}
    assert rows["good"]["metric"] == "c_index" and float(rows["good"]["estimate"]) > 0.7
    assert rows["good"]["baseline"] == "0.500"
    assert float(rows["good"]["clinical"]) > 0.65 and rows["good"]["clinical"] == rows["noise"]["clinical"]
    groups = [row for row in read(cohort / "eval" / "os_cox" / "survival.tsv") if row["encoder"] == "good"]
    high, low = groups
    assert (high["group"], low["group"]) == ("high risk", "low risk")
    assert float(high["median"]) < float(low["median"]) and int(high["cases"]) + int(low["cases"]) == 16
    found = predictions(cohort, "os_cox", "good")
    above = [float(row["above_cut"]) > 0 for row in found if row["seed"] == "0"]
    assert 0 < sum(above) < 16


def test_the_curves_of_the_risk_groups_are_kept_step_by_step(tmp_path):
    cohort = survival_cohort(tmp_path)
    arguments = ("--labels", cohort / "clinical.tsv", "--ratios", 1.0, "--seeds", 0, "--test-fraction", 0.4)
    assert run(cohort, "os_cox", *arguments) == 0
    steps = read(cohort / "eval" / "os_cox" / "survival_curves.tsv")
    for group in read(cohort / "eval" / "os_cox" / "survival.tsv"):
        curve = [s for s in steps if (s["encoder"], s["group"]) == (group["encoder"], group["group"])]
        chosen = [
            (float(row["time"]), float(row["event"]))
            for row in predictions(cohort, "os_cox", group["encoder"])
            if (float(row["above_cut"]) > 0) == (group["group"] == "high risk")
        ]
        assert len(chosen) == int(group["cases"]) == int(curve[0]["at_risk"])
        survival = 1.0
        for step in curve:
            time = float(step["time"])
            at_risk = sum(t >= time for t, _ in chosen)
            events = sum(t == time and e > 0 for t, e in chosen)
            survival *= 1 - events / at_risk
            assert (int(step["at_risk"]), int(step["events"])) == (at_risk, events)
            assert int(step["left"]) == sum(t == time and not e for t, e in chosen)
            assert float(step["survival"]) == pytest.approx(survival, abs=5e-4)
        reached = [float(step["time"]) for step in curve if float(step["survival"]) <= 0.5]
        assert float(group["median"]) == pytest.approx(min(reached), abs=1e-3)


def test_probabilities_of_two_classes_stand_beside_what_was_observed(tmp_path):
    cohort = survival_cohort(tmp_path)
    arguments = ("--labels", cohort / "clinical.tsv", "--ratios", 1.0, "--seeds", 0, 1, "--test-fraction", 0.4)
    assert run(cohort, "os_class", *arguments) == 0
    bins = [row for row in read(cohort / "eval" / "os_class" / "reliability.tsv") if row["encoder"] == "good"]
    assert len(bins) == 10
    column = f"probability_{bins[0]['positive']}"
    rows = predictions(cohort, "os_class", "good")
    for each in bins:
        inside = [r for r in rows if float(each["low"]) < float(r[column]) <= float(each["high"]) + 1e-12]
        assert int(each["n"]) == len(inside)
        if inside:
            share = np.mean([row["target"] == each["positive"] for row in inside])
            assert float(each["observed_share"]) == pytest.approx(share, abs=5e-4)
            mean = np.mean([float(row[column]) for row in inside])
            assert float(each["mean_predicted"]) == pytest.approx(mean, abs=5e-4)


def test_sequences_that_a_patient_lacks_are_left_out_of_the_mean(tmp_path, capsys):
    cohort = survival_cohort(tmp_path)
    arguments = ("--labels", cohort / "clinical.tsv", "--ratios", 1.0, "--seeds", 0, "--test-fraction", 0.4)
    assert run(cohort, "os_class", *arguments) == 0
    out = capsys.readouterr().out
    assert "left out" in out and "no death_within_365_days" in out
    cases = read(cohort / "eval" / "os_class" / "cases.tsv")
    assert {len(row["scans"].split()) for row in cases} == {3, 4}
    good = next(r for r in summary(cohort, "os_class") if r["encoder"] == "good" and r["metric"] == "auc")
    assert float(good["estimate"]) > 0.6


def test_patch_pools_take_a_range_of_slices_and_volume_encoders_their_own_feature(tmp_path):
    rng = np.random.default_rng(0)
    lines, slices, volumes = ["subject\tdiagnosis"], {}, {}
    for number in range(40):
        patient = number % 2
        lines.append(f"{number:02d}\t{('control', 'PD')[patient]}")
        scan = Scan(f"/{number:02d}.nii", "ppmi", f"{number:02d}", "", "T1")
        feature = rng.standard_normal((NUM_SLICES, 5))
        feature[1] *= 0.1
        feature[1, 0] += 6 * patient  # position 0.375 of four slices: inside 0.35 to 0.60
        slices[scan], volumes[scan] = feature, feature[1:2]
    (tmp_path / "labels.tsv").write_text("\n".join([*lines, ""]))
    write_features(tmp_path / "slices", slices)
    write_features(tmp_path / "volumes", volumes, with_slices=False)
    arguments = ("--labels", tmp_path / "labels.tsv", "--ratios", 1.0, "--seeds", 0)
    assert run(tmp_path, "ppmi", *arguments, encoders=["slices", "volumes"]) == 0
    estimates = {row["encoder"]: float(row["estimate"]) for row in summary(tmp_path, "ppmi") if row["metric"] == "auc"}
    assert estimates == {"slices": 1.0, "volumes": 1.0}


def test_simulated_cohorts_are_called_so(tmp_path):
    description = {"Name": "x", "GeneratedBy": [{"Name": "braindino simulate"}]}
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    assert data_note([Scan(str(tmp_path / "sub-01" / "a.nii"), "c", "01")]) == "SIMULATED data"
    assert data_note([Scan("/elsewhere/a.nii", "c", "01")]) == ""


def test_mistakes_of_the_user_end_in_one_message(cohort, capsys):
    assert run(cohort, "sequences") == 1
    assert "no task 'sequences' (did you mean sequence?); choose one of abide, adni" in capsys.readouterr().err
    assert run(cohort, "brain_age") == 1
    assert "task brain_age needs --labels" in capsys.readouterr().err
    assert run(cohort, "sequence", encoders=["good", "good"]) == 1
    assert "found folders called ['good', 'good']" in capsys.readouterr().err
    (cohort / "list.txt").write_text("other/01\n")
    assert run(cohort, "sequence", "--test-subjects", cohort / "list.txt") == 1
    assert "holds 0 of the 20 subjects with cases" in capsys.readouterr().err
    assert run(cohort, "adni", "--labels", cohort) == 1
    assert "no label table has a column 'diagnosis'" in capsys.readouterr().err
    (cohort / "days.tsv").write_text("subject\tage_years\n00\t7300\n01\t30\n")
    assert run(cohort, "brain_age", "--labels", cohort / "days.tsv") == 1
    assert "age_years 7300 is outside 0 to 120 years; is the column in another unit" in capsys.readouterr().err


def test_test_subjects_that_were_pretrained_on_are_refused_or_stamped_on_every_result(cohort, capsys):
    (cohort / "held_out.txt").write_text("c/00\nc/07\n")
    arguments = ("--ratios", 1.0, "--seeds", 0, "--test-subjects", cohort / "held_out.txt")
    write_exposure(cohort / "good" / "pretrained_on.tsv", Exposure((Scan("", "c", "07"), Scan("", "c", "12"))))
    assert run(cohort, "sequence", *arguments) == 1
    error = capsys.readouterr().err
    assert "1 of 2 test subjects were seen when encoder good was pretrained: c/07 (same_subject: c/07)" in error
    assert "--allow-overlap" in error and not (cohort / "eval").exists()

    assert run(cohort, "sequence", *arguments, "--allow-overlap") == 0
    stamps = {row["encoder"]: row["pretraining_overlap"] for row in summary(cohort, "sequence")}
    assert stamps["good"].startswith("1 of 2 test subjects: same_subject 1; 8 of 8 test scans have no fingerprint")
    assert stamps["noise"] == "unknown: encoder noise has no pretrained_on.tsv"
    about = json.loads((cohort / "eval" / "sequence" / "run.json").read_text())
    assert about["provenance"]["pretraining_overlap"] == stamps

    # Pretrained on training subjects only: that is what the exclusion list is for.
    for name in ("good", "noise"):
        write_exposure(cohort / name / "pretrained_on.tsv", Exposure((Scan("", "c", "12"),)))
    assert run(cohort, "sequence", *arguments) == 0
    assert {row["pretraining_overlap"].partition(";")[0] for row in summary(cohort, "sequence")} == {"none"}


def test_a_person_with_two_ids_stays_on_one_side_unless_a_list_says_otherwise(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names = [f"UPENN-GBM-{n:05d}_{visit}" for n in range(6) for visit in (11, 21)]
    scans = [Scan(f"/{name}_{s}.nii", "upenn", name, "", s) for name in names for s in ("T1", "T2")]
    write_features(tmp_path / "e", {scan: rng.random((2, 4)) for scan in scans})
    arguments = ["--protocol", "repeated", "--num-splits", 3, "--test-fraction", 0.3, "--ratios", 1.0, "--seeds", 0]
    assert run(tmp_path, "knn_sequence", *arguments, encoders=["e"]) == 0
    for split in splits(tmp_path, "knn_sequence")["splits"]:
        persons = [{subject[:-3] for subject in split[side]} for side in ("train", "test")]
        assert not persons[0] & persons[1] and len(split["test"]) == 4
    (tmp_path / "list.txt").write_text("upenn/UPENN-GBM-00000_21\nupenn/UPENN-GBM-00001_11\nupenn/UPENN-GBM-00001_21\n")
    arguments = ["--test-subjects", tmp_path / "list.txt", "--ratios", 1.0, "--seeds", 0, "--replace"]
    capsys.readouterr()
    assert run(tmp_path, "knn_sequence", *arguments, encoders=["e"]) == 1
    error = capsys.readouterr().err
    assert "1 test subjects are also trained on, under another id: upenn/UPENN-GBM-00000_21." in error
    assert run(tmp_path, "knn_sequence", *arguments, "--allow-subject-leak", encoders=["e"]) == 0
    rows = summary(tmp_path, "knn_sequence")
    assert {row["warnings"] for row in rows} == {"subject leak: 1 trained on under another id"}
    assert {row["pretraining_overlap"] for row in rows} == {"unknown: encoder e has no pretrained_on.tsv"}


def test_attention_over_slices_finds_the_one_that_tells(tmp_path):
    rng = np.random.default_rng(0)
    lines, features = ["subject\tsick"], {}
    for number in range(60):
        sick = number % 2
        lines.append(f"{number:02d}\t{sick}")
        slices = rng.standard_normal((NUM_SLICES, 8))
        slices[rng.integers(NUM_SLICES), :2] = (8.0, 8.0 * (1 if sick else -1))  # the first feature marks it
        features[Scan(f"/{number:02d}.nii", "c", f"{number:02d}", "", "T1")] = slices
    (tmp_path / "labels.tsv").write_text("\n".join([*lines, ""]))
    write_features(tmp_path / "e", features)
    task = tmp_path / "lesion.yaml"
    task.write_text(
        'title: Lesion\ninputs: {sequences: [T1]}\ntarget: {kind: class, column: sick, classes: ["0", "1"]}\n'
        "head: {kind: attention, hidden_width: 32}\ntraining: {steps: 200, learning_rate: 5.0e-3}\nmetrics: [auc]\n"
    )
    arguments = ("--labels", tmp_path / "labels.tsv", "--ratios", 1.0, "--seeds", 0, "--test-fraction", 0.3)
    assert run(tmp_path, task, *arguments, encoders=["e"]) == 0
    (row,) = summary(tmp_path, "lesion")
    assert float(row["estimate"]) > 0.9


def test_unknown_keys_and_unfit_values_of_a_task_are_named(cohort, capsys):
    task = cohort / "own.yaml"
    base = "title: T\ninputs: {sequences: [T1]}\ntarget: {kind: number, column: age, unit: years}\nmetrics: [mae]\n"
    for change, message in {
        "training: {loss: squared_error, learning_rat: 1.0e-3}": "training.learning_rat: unknown key; did you mean "
        "learning_rate?",
        "training: {loss: cross_entropy}": "training.loss: found cross_entropy for a target of kind number; expected "
        "squared_error or log_mixed",
        "training: {loss: squared_error, steps: many}": "training.steps: found 'many'; expected int",
        "training: {loss: squared_error}\nmetrics: [auc]": "metrics: auc does not fit a target of kind number",
        "extends: nothing": "no task",
    }.items():
        task.write_text(base + change + "\n")
        assert run(cohort, task, "--labels", cohort) == 1
        assert message in capsys.readouterr().err
