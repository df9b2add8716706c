"""Heads of clean features asked about perturbed ones: the clean numbers are those of evaluate, nothing is lost."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch

from braindino.downstream import evaluate, reproduce, robustness
from braindino.downstream.heads import Head, Training, train_heads
from braindino.downstream.metrics import macro_auc
from braindino.encoders.contract import Features, Identity, Layers, SliceFeatures
from braindino.feature_table import FeatureTable, FeatureTableMeta, FeatureTableWriter
from braindino.manifest import Scan
from braindino.robustness_table import read_robustness

NUM_SLICES = 3
SEQUENCES = ("T1", "T2")
CONDITIONS = {"gamma-0.5": 0.5, "gamma-2": 3.0, "gibbs-0.4": 0.3, "bias_field-0.2": 0.0}


def write_features(folder, features_of, *, name):
    """A feature table of scans -> (S, D) slices."""
    first = next(iter(features_of.values()))
    meta = FeatureTableMeta(Identity(name, name * 8, {}, {}), "float32", first.shape[1], len(first))
    with FeatureTableWriter(folder, meta) as writer:
        for scan, slices in features_of.items():
            cls = torch.as_tensor(slices, dtype=torch.float32)
            mean = cls.mean(dim=0)
            writer.add(scan, Features(mean, Layers(mean, mean, mean), None, SliceFeatures(cls, -cls)))


def features_of_all(name, noise, seed):
    """scan -> slices: what is known of age, sex and death, and noise of a strength that grows with the severity."""
    rng, more = np.random.default_rng(7), np.random.default_rng(seed)
    found = {}
    for number in range(40):
        for index, sequence in enumerate(SEQUENCES):
            slices = 0.3 * rng.standard_normal((NUM_SLICES, 5))
            slices[:, 0] += (number - 20) / 10
            slices[:, 1] += 2.0 * (number % 2)
            slices[:, 2] += 3.0 * index
            slices += noise * more.standard_normal(slices.shape)
            if name == "other":
                slices = 0.5 * slices[:, ::-1] + 1
            found[Scan(f"/data/{number:02d}_{sequence}.nii.gz", "c", f"{number:02d}", "", sequence)] = slices
    return found


@pytest.fixture
def cohort(tmp_path):
    """40 subjects with two sequences, two encoders, clean and under four conditions."""
    lines = ["participant_id\tage\tsex\tdays\tdied"]
    for number in range(40):
        lines.append(f"sub-{number:02d}\t{30 + number}\t{'FM'[number % 2]}\t{900 - 20 * number}\t{int(number % 5 > 0)}")
    (tmp_path / "participants.tsv").write_text("\n".join([*lines, ""]))
    for encoder in ("ours", "other"):
        write_features(tmp_path / "clean" / encoder, features_of_all(encoder, 0.0, 0), name=encoder)
        for seed, (condition, noise) in enumerate(CONDITIONS.items(), start=1):
            folder = tmp_path / "conditions" / condition / encoder
            write_features(folder, features_of_all(encoder, noise, seed), name=encoder)
    tasks = {
        "sex": "target: {kind: class, column: sex, classes: [F, M]}\nmetrics: [auc, macro_auc, balanced_accuracy]",
        "nearest": "target: {kind: class, column: sex, classes: [F, M]}\nknn: {neighbours: [1, 5, 50]}\n"
        "metrics: [accuracy, balanced_accuracy]",
        "years": "target: {kind: number, column: age, unit: years}\n"
        "training: {loss: squared_error, steps: 100, learning_rate: 5.0e-3}\n"
        "metrics: [mae, rmse, r2]",
        "death": "target: {kind: survival, column: days, unit: days, event: died}\n"
        "training: {loss: cox, steps: 60}\nmetrics: [c_index]",
        "fused": "target: {kind: class, column: sex, classes: [F, M]}\nmetrics: [auc]",
    }
    for name, text in tasks.items():
        inputs = "{sequences: [T1, T2], fusion: mean}" if name in ("fused", "death") else "{sequences: [T1, T2]}"
        quick = "" if "training" in text or "knn" in text else "\ntraining: {steps: 60, learning_rate: 5.0e-3}"
        head = "" if "knn" in text else "\nhead: {hidden_width: 16}"
        (tmp_path / f"{name}.yaml").write_text(f'title: "{name}"\ninputs: {inputs}\n{text}{quick}{head}\n')
    return tmp_path


def common(cohort, task, encoders, out, more):
    features = [str(cohort / "clean" / name) for name in encoders]
    labels = ["--labels", str(cohort / "participants.tsv"), "--device", "cpu"]
    return [str(cohort / f"{task}.yaml"), "--features", *features, *labels, "--out", str(out), *map(str, more)]


def run(cohort, task, *more, encoders=("ours", "other"), out="robustness"):
    conditions = ["--conditions", str(cohort / "conditions")]
    return robustness.main([*common(cohort, task, encoders, cohort / out, more), *conditions])


def run_evaluate(cohort, task, *more, encoders=("ours", "other")):
    arguments = [*common(cohort, task, encoders, cohort / "eval", more), "--permutations", "0", "--ratios", "1.0"]
    return evaluate.main(arguments)


def read(path, delimiter="\t"):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle, delimiter=delimiter))


def table(cohort, task, out="robustness"):
    return {
        (row.encoder, row.variant, row.metric, row.perturbation, row.severity): row
        for row in read_robustness(cohort / out / task / "robustness.tsv")
    }


@pytest.mark.parametrize("task", ["sex", "nearest", "years", "death", "fused"])
@pytest.mark.parametrize("protocol", [(), ("--protocol", "kfold", "--num-splits", "3")])
def test_clean_numbers_and_predictions_are_those_of_evaluate(cohort, task, protocol):
    assert run_evaluate(cohort, task, *protocol) == 0
    assert run(cohort, task, *protocol) == 0
    for encoder in ("ours", "other"):
        alone = read(cohort / "eval" / task / encoder / "predictions.csv", ",")
        beside = [
            {name: text for name, text in row.items() if name != "condition"}
            for row in read(cohort / "robustness" / task / encoder / "predictions.csv", ",")
            if row["condition"] == "clean"
        ]
        assert beside == alone
    rows = table(cohort, task)
    summary = read(cohort / "eval" / task / "summary.tsv")
    assert summary
    for row in summary:
        for perturbation, severity in (("gamma", 1.0), ("gibbs", 0.0), ("bias_field", 0.0)):
            clean = rows[row["encoder"], row["variant"], row["metric"], perturbation, severity]
            assert clean.clean
            assert math.isnan(clean.change)
            for name in ("estimate", "low", "high"):
                expected = float(row[name].replace("n/a", "nan"))
                assert getattr(clean, name) == pytest.approx(expected, abs=6e-4, nan_ok=True)
    for name in ("cases.tsv", "splits.json"):
        assert (cohort / "eval" / task / name).read_bytes() == (cohort / "robustness" / task / name).read_bytes()


def test_outputs_of_clean_rows_are_the_same_bits_whatever_else_is_asked():
    rng = np.random.default_rng(0)
    for head, training, targets in (
        (Head(kind="mlp", hidden_width=24), Training(steps=8), rng.integers(0, 3, 37)),
        (Head(kind="linear"), Training(steps=8, loss="squared_error"), rng.random(37)),
        (Head(kind="logistic"), Training(), rng.integers(0, 3, 37)),
        (Head(kind="linear"), Training(steps=8, smote=True), np.arange(37) % 4 // 2),
        (Head(kind="attention", hidden_width=8), Training(steps=4), rng.integers(0, 3, 37)),
    ):
        shape = (37, 4, 6) if head.kind == "attention" else (37, 6)
        x = rng.standard_normal(shape).astype(np.float32)
        queries = [rng.standard_normal((n, *shape[1:])).astype(np.float32) for n in (700, 0, 1)]
        asked = {
            "subsets": [np.arange(20), np.arange(10, 30)],
            "seeds": [0, 1],
            "num_outputs": 1 if training.loss == "squared_error" else 3,
            "head": head,
            "training": training,
        }
        alone = train_heads(x, targets, **asked)
        beside = train_heads(x, targets, queries=queries, **asked)
        assert beside.shape[1] == 37 + 701
        np.testing.assert_array_equal(beside[:, :37], alone)
        # A block's outputs are those that it has by itself, and those of clean rows where it is the clean rows.
        np.testing.assert_array_equal(train_heads(x, targets, queries=[queries[2]], **asked)[:, 37:], beside[:, 737:])
        np.testing.assert_array_equal(train_heads(x, targets, queries=[x], **asked)[:, 37:], alone)


@pytest.mark.parametrize("bad", [np.zeros((2, 5)), np.full((2, 6), np.nan)])
def test_queries_of_another_shape_or_not_finite_are_refused(bad):
    x, targets = np.zeros((4, 6)), np.array([0, 1, 0, 1])
    asked = {"subsets": [np.arange(4)], "seeds": [0], "num_outputs": 2, "head": Head(), "training": Training(steps=1)}
    with pytest.raises(ValueError, match="queries, block 1: shape"):
        train_heads(x, targets, queries=[x, bad], **asked)


def test_scores_under_a_condition_are_those_of_its_predictions(cohort):
    assert run(cohort, "sex", "--seeds", 0, 1) == 0
    rows = read(cohort / "robustness" / "sex" / "ours" / "predictions.csv", ",")
    found = table(cohort, "sex")
    assert {row["condition"] for row in rows} == {"clean", *CONDITIONS}
    values = {}
    for condition in ("clean", "gamma-2"):
        aucs = []
        for seed in "01":
            of_seed = [row for row in rows if row["condition"] == condition and row["seed"] == seed]
            targets = np.array([row["target"] == "M" for row in of_seed]).astype(int)
            p = np.array([[float(row["probability_F"]), float(row["probability_M"])] for row in of_seed])
            aucs.append(macro_auc(targets, p, weights=np.ones((1, len(p))))[0])
        values[condition] = np.mean(aucs)
    dark = found["ours", "", "macro_auc", "gamma", 2.0]
    assert dark.estimate == pytest.approx(values["gamma-2"], abs=1e-6)
    assert dark.change == pytest.approx(values["gamma-2"] - values["clean"], abs=1e-5)
    assert dark.change_low < dark.change < dark.change_high
    assert dark.p < 0.05
    assert (dark.better, dark.n_subjects, dark.n_cases, dark.n_missing) == ("higher", 8, 16, 0)
    assert "change: paired 95 % percentile bootstrap over subjects" in dark.method
    # The bias field here leaves features as they are.
    same = found["ours", "", "macro_auc", "bias_field", 0.2]
    assert (same.change, same.change_low, same.change_high, same.p) == (0, 0, 0, 1)
    assert same.estimate == found["ours", "", "macro_auc", "bias_field", 0.0].estimate


def test_perturbed_scans_are_asked_and_never_learnt(cohort):
    assert run(cohort, "years") == 0
    before = table(cohort, "years")
    shutil.rmtree(cohort / "conditions" / "gamma-2")
    assert run(cohort, "years", out="fewer") == 0
    after = table(cohort, "years", out="fewer")
    assert {key for key in before if key not in after} == {key for key in before if key[3:] == ("gamma", 2.0)}
    assert all(repr(after[key]) == repr(before[key]) for key in after)


def test_errors_rise_with_the_noise_and_are_tested_by_paired_t(cohort):
    assert run(cohort, "years", "--protocol", "holdout", "--test-fraction", 0.5) == 0
    rows = table(cohort, "years")
    clean, mild, strong = (rows["ours", "", "mae (years)", "gamma", g] for g in (1.0, 0.5, 2.0))
    assert clean.estimate < mild.estimate < strong.estimate
    assert strong.better == "lower"
    assert strong.change > 0
    assert strong.p < 0.01
    assert "paired t test over subjects" in strong.method
    assert "paired 95 % percentile bootstrap" in rows["ours", "", "rmse (years)", "gamma", 2.0].method


def test_several_test_sets_are_compared_by_the_corrected_test(cohort):
    assert run(cohort, "sex", "--protocol", "repeated", "--num-splits", 4) == 0
    dark = table(cohort, "sex")["ours", "", "auc", "gamma", 2.0]
    assert "change: corrected resampled t test (Nadeau-Bengio) over splits, 4 of 4 splits" in dark.method
    assert dark.method.startswith("95 % Student t interval over splits")


def test_neighbours_are_looked_up_among_clean_scans_and_tested_by_mcnemar(cohort):
    assert run(cohort, "nearest", "--seeds", 0, "--test-fraction", 0.4) == 0
    rows = table(cohort, "nearest")
    dark = rows["ours", "k=5", "accuracy", "gamma", 2.0]
    assert "exact McNemar test over subjects" in dark.method
    assert dark.estimate < rows["ours", "k=5", "accuracy", "gamma", 1.0].estimate
    clean = FeatureTable(cohort / "clean" / "ours")
    other = FeatureTable(cohort / "conditions" / "gamma-2" / "ours")
    splits = json.loads((cohort / "robustness" / "nearest" / "splits.json").read_text())["splits"][0]
    bank = [scan for scan in clean.scans if scan.subject_key in splits["train"]]
    tested = [scan for scan in clean.scans if scan.subject_key in splits["test"]]
    features, queries = clean.pooled(bank), other.pooled(tested)
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (features, queries)]
    nearest = (unit[1] @ unit[0].T).argmax(axis=1)
    right = [int(bank[index].subject) % 2 == int(scan.subject) % 2 for index, scan in zip(nearest, tested, strict=True)]
    assert rows["ours", "k=1", "accuracy", "gamma", 2.0].estimate == pytest.approx(np.mean(right), abs=1e-6)


def drop(folder, *subjects, sequence="T1"):
    """Take scans out of a table, as extract leaves it when prepare has quarantined them."""
    lines = (folder / "scans.tsv").read_text().splitlines()
    gone = {f"/data/{subject}_{sequence}.nii.gz" for subject in subjects}
    kept = [line for line in lines if line.split("\t")[0] not in gone]
    assert len(kept) == len(lines) - len(subjects)
    (folder / "scans.tsv").write_text("\n".join([*kept, ""]))


def test_scans_that_a_condition_lacks_are_counted_named_and_left_out_on_both_sides(cohort, capsys):
    (cohort / "held-out.txt").write_text("".join(f"c/{number:02d}\n" for number in range(0, 40, 3)))
    drop(cohort / "conditions" / "gamma-2" / "ours", "03", "06")
    drop(cohort / "conditions" / "gamma-2" / "other", "06", "09")
    assert run(cohort, "sex", "--test-subjects", cohort / "held-out.txt") == 0
    rows = table(cohort, "sex")
    dark, mild = (rows["ours", "", "auc", "gamma", g] for g in (2.0, 0.5))
    # 14 subjects with two scans each; encoders are scored on the same cases.
    assert (mild.n_cases, mild.n_missing) == (28, 0)
    assert (dark.n_cases, dark.n_missing, dark.n_subjects) == (25, 3, 14)
    assert rows["other", "", "auc", "gamma", 2.0].n_cases == 25
    missing = read(cohort / "robustness" / "sex" / "missing.tsv")
    assert [(row["condition"], row["subject"]) for row in missing] == [
        ("gamma-2", "c/03"), ("gamma-2", "c/06"), ("gamma-2", "c/09"),
    ]  # fmt: skip
    assert "gamma-2: 3 of 28 tested cases are missing" in capsys.readouterr().out
    # The change is that of the 25 cases that both have.
    predictions = read(cohort / "robustness" / "sex" / "ours" / "predictions.csv", ",")
    there = {row["case"] for row in predictions if row["condition"] == "gamma-2"}
    values = {}
    for condition in ("clean", "gamma-2"):
        aucs = []
        for seed in "012":
            of_seed = [
                r for r in predictions if (r["condition"], r["seed"]) == (condition, seed) and r["case"] in there
            ]
            targets = np.array([row["target"] == "M" for row in of_seed]).astype(int)
            p = np.array([[float(row["probability_F"]), float(row["probability_M"])] for row in of_seed])
            aucs.append(macro_auc(targets, p, weights=np.ones((1, len(p))))[0])
        values[condition] = np.mean(aucs)
    assert dark.change == pytest.approx(values["gamma-2"] - values["clean"], abs=1e-5)
    run_json = json.loads((cohort / "robustness" / "sex" / "run.json").read_text())
    assert len(run_json["encoders"]["ours"]["conditions"]["gamma-2"]["missing_cases"]) == 3


def test_a_fused_case_without_one_of_its_scans_is_missing_and_not_averaged_from_the_rest(cohort):
    (cohort / "held-out.txt").write_text("".join(f"c/{number:02d}\n" for number in range(12)))
    drop(cohort / "conditions" / "gamma-2" / "ours", "03", sequence="T2")
    assert run(cohort, "fused", "--test-subjects", cohort / "held-out.txt", encoders=("ours",)) == 0
    dark = table(cohort, "fused")["ours", "", "auc", "gamma", 2.0]
    assert (dark.n_cases, dark.n_missing) == (11, 1)


def test_the_median_risk_stays_that_of_clean_training_cases(cohort):
    assert run(cohort, "death", "--protocol", "kfold", "--num-splits", 2, "--seeds", 0) == 0
    rows = read(cohort / "robustness" / "death" / "ours" / "predictions.csv", ",")
    cuts = {}
    for row in rows:
        cut = float(row["predicted"]) - float(row["above_cut"])
        cuts.setdefault(row["split"], []).append(cut)
    for of_split in cuts.values():
        assert np.ptp(of_split) < 1e-5


def test_results_of_other_settings_are_not_replaced_unasked(cohort, capsys):
    assert run(cohort, "sex") == 0
    kept = (cohort / "robustness" / "sex" / "robustness.tsv").read_bytes()
    assert run(cohort, "sex") == 0
    assert (cohort / "robustness" / "sex" / "robustness.tsv").read_bytes() == kept
    assert run(cohort, "sex", "--ratio", 0.5) == 1
    assert "holds results of other settings" in capsys.readouterr().err
    assert (cohort / "robustness" / "sex" / "robustness.tsv").read_bytes() == kept
    write_features(cohort / "conditions" / "gamma-2" / "ours", features_of_all("ours", 0.9, 99), name="ours")
    assert run(cohort, "sex") == 1
    assert "holds results of other encoders" in capsys.readouterr().err
    assert run(cohort, "sex", "--replace") == 0
    assert (cohort / "robustness" / "sex" / "robustness.tsv").read_bytes() != kept


def test_reproduce_says_that_it_is_for_evaluations(cohort, capsys):
    assert run(cohort, "sex") == 0
    assert reproduce.main([str(cohort / "robustness" / "sex")]) == 1
    assert "results of `braindino robustness`; its command in run.json" in capsys.readouterr().err


def test_features_that_do_not_belong_together_are_refused(cohort, capsys):
    conditions = cohort / "conditions"
    shutil.copytree(conditions / "gamma-2" / "other", conditions / "gibbs-0.1" / "ours")
    shutil.copytree(conditions / "gamma-2" / "other", conditions / "gibbs-0.1" / "other")
    assert run(cohort, "sex") == 1
    assert "features of another encoder, preparation, reading or precision" in capsys.readouterr().err
    shutil.rmtree(conditions / "gibbs-0.1" / "ours")
    assert run(cohort, "sex") == 1
    assert "no features of encoder ours under gibbs-0.1; run `braindino extract`" in capsys.readouterr().err
    shutil.rmtree(conditions / "gibbs-0.1")
    renamed = {
        Scan(scan.path, "gamma-0.8", scan.subject, "", scan.sequence): slices
        for scan, slices in features_of_all("ours", 0, 0).items()
    }
    write_features(conditions / "gamma-0.8" / "ours", renamed, name="ours")
    assert run(cohort, "sex", encoders=("ours",)) == 1
    error = capsys.readouterr().err
    assert "Its scans are of cohort gamma-0.8, the clean ones of c: prepare the condition with" in error


def test_folders_that_are_no_condition_are_named(cohort, capsys):
    (cohort / "conditions" / "notes").mkdir()
    (cohort / "conditions" / "clean").mkdir()
    assert run(cohort, "sex", encoders=("ours",)) == 0
    assert "passed over notes in" in capsys.readouterr().out
    (cohort / "conditions" / "gibbs-7").mkdir()
    assert run(cohort, "sex", encoders=("ours",)) == 1
    assert "condition 'gibbs-7': expected a severity from 0 to 1" in capsys.readouterr().err
    empty = cohort / "empty"
    (empty / "others").mkdir(parents=True)
    arguments = common(cohort, "sex", ("ours",), cohort / "out", ())
    assert robustness.main([*arguments, "--conditions", str(empty)]) == 1
    assert "found others; expected folders such as gamma-0.5" in capsys.readouterr().err
    assert robustness.main([*arguments, "--conditions", str(cohort / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
