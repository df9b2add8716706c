import csv
import json

import numpy as np
import pytest

from braindino.downstream.evaluate import main
from braindino.downstream.evaluation import Prediction, count_far_outside, make_split, select_cases
from braindino.downstream.results import data_note
from braindino.downstream.tasks import TASKS
from braindino.feature_table import FeatureTableWriter
from braindino.leakage import Exposure, write_exposure
from braindino.manifest import SEQUENCES, Scan


@pytest.fixture
def cohort(tmp_path):
    """20 subjects with four sequences; `good` tells the sequence and the age, `noise` nothing."""
    rng = np.random.default_rng(0)
    age = {f"{number:02d}": 20.0 + 3 * number for number in range(20)}
    lines = [f"sub-{subject}\t{years}" for subject, years in age.items()]
    (tmp_path / "participants.tsv").write_text("\n".join(["participant_id\tage", *lines, ""]))
    for name in ("good", "noise"):
        with FeatureTableWriter(
            tmp_path / name, encoder_name=name, encoder_sha256=name * 8, preparation={"slices": "2"}
        ) as writer:
            for subject, years in age.items():
                for index, sequence in enumerate(SEQUENCES):
                    feature = rng.standard_normal(6) * (0.05 if name == "good" else 1.0)
                    if name == "good":
                        feature[index] += 3.0
                        feature[4] += (years - 50) / 20
                    scan = Scan(f"/data/{subject}_{sequence}.nii.gz", "c", subject, "", sequence)
                    writer.add(scan, np.stack([feature, feature]).astype(np.float32))
    return tmp_path


def evaluate(cohort, task, *more, encoders=("good", "noise")):
    features = [str(cohort / name) for name in encoders]
    return main([task, "--features", *features, "--out", str(cohort / "eval"), "--device", "cpu", *more])


def summary(cohort, task):
    with (cohort / "eval" / task / "summary.tsv").open(newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def test_the_sequence_task_finds_the_encoder_that_knows_and_the_one_that_does_not(cohort, capsys):
    assert evaluate(cohort, "sequence", "--ratios", "0.3", "1.0", "--seeds", "0", "1") == 0
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
    assert "good" in capsys.readouterr().out


def test_every_seed_folder_tells_who_was_tested_on_and_where_the_numbers_come_from(cohort):
    evaluate(cohort, "sequence", "--ratios", "0.5", "1.0", "--seeds", "3", encoders=["good"])
    folder = cohort / "eval" / "sequence" / "good" / "seed_3"
    metrics = json.loads((folder / "metrics.json").read_text())
    splits = json.loads((folder / "splits.json").read_text())
    with (folder / "predictions.csv").open(newline="") as handle:
        predictions = list(csv.DictReader(handle))

    assert len(splits["train"]) == 14 and len(splits["test"]) == 6
    assert not set(splits["train"]) & set(splits["test"])
    assert set(splits["train_by_ratio"]["0.5"]) < set(splits["train_by_ratio"]["1.0"]) == set(splits["train"])
    full = [row for row in predictions if row["ratio"] == "1"]
    assert {f"c/{row['subject']}" for row in full} == set(splits["test"])
    hand = np.mean([row["target"] == row["predicted"] for row in full])
    (entry,) = [r for r in metrics["results"] if r["ratio"] == 1.0 and r["metric"] == "accuracy"]
    assert entry["estimate"] == pytest.approx(hand)
    assert (entry["n"], entry["num_test_scans"], entry["num_train_scans"]) == (6, 24, 56)
    assert "bootstrap over subjects" in entry["method"]
    provenance = metrics["provenance"]
    assert provenance["features"]["encoder_sha256"] == "good" * 8
    assert provenance["command"][:3] == ["braindino", "evaluate", "sequence"]
    assert {"torch", "numpy", "python"} <= set(provenance["versions"])
    assert metrics["task"]["section"] == "4.3.6"


def test_brain_age_uses_t1_only_and_stands_beside_the_training_mean(cohort, capsys):
    assert evaluate(cohort, "brain_age", "--ratios", "1.0", "--seeds", "0", "--labels", str(cohort)) == 0
    good, noise = summary(cohort, "brain_age")
    assert good["metric"] == "mae (years)"
    assert good["baseline_name"] == "training mean"
    assert float(good["high"]) < float(good["baseline_low"])
    assert float(noise["high"]) > float(noise["baseline_low"])
    out = capsys.readouterr().out
    assert "20 scans of 20 subjects" in out
    assert "left out: 20 scans, sequence FLAIR" in out


def test_knn_leaves_out_neighbourhoods_larger_than_the_bank_and_says_so(cohort, capsys):
    arguments = ("--ratios", "0.1", "1.0", "--seeds", "0")
    assert evaluate(cohort, "knn_sequence", *arguments, encoders=["good"]) == 0
    variants = [(row["ratio"], row["variant"]) for row in summary(cohort, "knn_sequence")]
    assert [variant for ratio, variant in variants if ratio == "0.1"] == ["k=1", "k=3"]
    assert [variant for ratio, variant in variants if ratio == "1"] == ["k=1", "k=3", "k=5", "k=10", "k=20", "k=50"]
    assert "ratio 0.1: left out k = 5, 10, 20, 50, larger than the memory bank" in capsys.readouterr().out


def test_a_list_of_test_subjects_fixes_the_test_set_for_all_seeds(cohort):
    (cohort / "held_out.txt").write_text("# held out\nc/00\nc/07\nother/99\n")
    arguments = ("--ratios", "1.0", "--seeds", "0", "1", "--test-subjects", str(cohort / "held_out.txt"))
    assert evaluate(cohort, "sequence", *arguments, encoders=["good"]) == 0
    for seed in (0, 1):
        splits = json.loads((cohort / "eval" / "sequence" / "good" / f"seed_{seed}" / "splits.json").read_text())
        assert splits["test"] == ["c/00", "c/07"]
        assert len(splits["train"]) == 18


def test_encoders_are_compared_on_the_scans_that_all_of_them_have(cohort, capsys):
    with FeatureTableWriter(
        cohort / "part", encoder_name="part", encoder_sha256="p" * 64, preparation={"slices": "2"}
    ) as writer:
        for number in range(6):
            for sequence in SEQUENCES[:2]:
                scan = Scan(f"/data/{number:02d}_{sequence}.nii.gz", "c", f"{number:02d}", "", sequence)
                writer.add(scan, np.ones((2, 3), np.float32))
    assert evaluate(cohort, "sequence", "--ratios", "1.0", "--seeds", "0", encoders=["good", "part"]) == 0
    out = capsys.readouterr().out
    assert "68 scans of good are left out: not all encoders have them" in out
    assert "12 scans of 6 subjects" in out


def test_nested_subsets_and_test_subjects_never_meet_whatever_the_seed(cohort):
    scans = [Scan(f"/{s}{q}{v}.nii", "c", f"s{s}", f"v{v}", q) for s in range(9) for q in SEQUENCES for v in range(2)]
    cases = select_cases(TASKS["sequence"], scans, {})
    for seed in range(5):
        split = make_split(
            TASKS["sequence"], cases, seed=seed, ratios=(0.2, 0.6, 1.0), test_fraction=0.3, test_subjects=None
        )
        assert set(split.subsets[0.2]) < set(split.subsets[0.6]) < set(split.subsets[1.0]) == set(split.train)
        assert not set(cases.rows(split.train)) & set(cases.rows(split.test))
        assert len(cases.rows(split.train)) + len(cases.rows(split.test)) == len(scans)


def test_the_same_call_gives_the_same_numbers(cohort):
    evaluate(cohort, "brain_age", "--ratios", "1.0", "--seeds", "0", "--labels", str(cohort), encoders=["good"])
    path = cohort / "eval" / "brain_age" / "good" / "seed_0" / "predictions.csv"
    first = path.read_bytes()
    evaluate(cohort, "brain_age", "--ratios", "1.0", "--seeds", "0", "--labels", str(cohort), encoders=["good"])
    assert path.read_bytes() == first


def test_predictions_far_outside_the_training_range_are_counted():
    # Training ages of 40 to 46 years: half the width is 3 years, so 37 to 49 pass.
    prediction = Prediction(np.arange(4), np.zeros(4), np.array([36.9, 37.1, 48.9, 49.1]))
    assert count_far_outside(np.array([40.0, 46.0]), prediction) == 2


def test_simulated_cohorts_are_called_so(tmp_path):
    description = {"Name": "x", "GeneratedBy": [{"Name": "braindino simulate"}]}
    (tmp_path / "dataset_description.json").write_text(json.dumps(description))
    assert data_note([Scan(str(tmp_path / "sub-01" / "a.nii"), "c", "01")]) == "SIMULATED data"
    assert data_note([Scan("/elsewhere/a.nii", "c", "01")]) == ""


def test_mistakes_of_the_user_end_in_one_message(cohort, capsys):
    assert evaluate(cohort, "sequences") == 1
    assert "no task 'sequences'; choose one of sequence, brain_age, knn_sequence" in capsys.readouterr().err
    assert evaluate(cohort, "brain_age") == 1
    assert "task brain_age needs --labels" in capsys.readouterr().err
    assert evaluate(cohort, "sequence", encoders=["good", "good"]) == 1
    assert "found folders called ['good', 'good']" in capsys.readouterr().err
    (cohort / "list.txt").write_text("other/01\n")
    assert evaluate(cohort, "sequence", "--test-subjects", str(cohort / "list.txt")) == 1
    assert "holds 0 of the 20 subjects with cases" in capsys.readouterr().err


def test_test_subjects_that_were_pretrained_on_are_refused_or_stamped_on_every_result(cohort, capsys):
    (cohort / "held_out.txt").write_text("c/00\nc/07\n")
    arguments = ("--ratios", "1.0", "--seeds", "0", "--test-subjects", str(cohort / "held_out.txt"))
    write_exposure(cohort / "good" / "pretrained_on.tsv", Exposure((Scan("", "c", "07"), Scan("", "c", "12"))))
    assert evaluate(cohort, "sequence", *arguments) == 1
    error = capsys.readouterr().err
    assert "1 of 2 test subjects were seen when encoder good was pretrained: c/07 (same_subject: c/07)" in error
    assert "--allow-overlap" in error and not (cohort / "eval").exists()

    assert evaluate(cohort, "sequence", *arguments, "--allow-overlap") == 0
    stamps = {row["encoder"]: row["pretraining_overlap"] for row in summary(cohort, "sequence")}
    assert stamps["good"].startswith("1 of 2 test subjects: same_subject 1; 8 of 8 test scans have no fingerprint")
    assert stamps["noise"] == "unknown: encoder noise has no pretrained_on.tsv"
    for name, stamp in stamps.items():
        metrics = json.loads((cohort / "eval" / "sequence" / name / "seed_0" / "metrics.json").read_text())
        assert metrics["pretraining_overlap"] == stamp

    # Pretrained on training subjects only: that is what the exclusion list is for.
    for name in ("good", "noise"):
        write_exposure(cohort / name / "pretrained_on.tsv", Exposure((Scan("", "c", "12"),)))
    assert evaluate(cohort, "sequence", *arguments) == 0
    assert {row["pretraining_overlap"].partition(";")[0] for row in summary(cohort, "sequence")} == {"none"}


def test_a_person_with_two_ids_stays_on_one_side_unless_a_list_says_otherwise(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names = [f"UPENN-GBM-{n:05d}_{visit}" for n in range(6) for visit in (11, 21)]
    with FeatureTableWriter(tmp_path / "e", encoder_name="e", encoder_sha256="e", preparation={}) as writer:
        for name in names:
            for sequence in ("T1", "T2"):
                writer.add(Scan(f"/{name}_{sequence}.nii", "upenn", name, "", sequence), rng.random((2, 4)))
    base = ["knn_sequence", "--features", str(tmp_path / "e"), "--out", str(tmp_path / "eval"), "--ratios", "1.0"]
    assert main(base) == 0
    for seed in range(3):
        splits = json.loads((tmp_path / "eval" / "knn_sequence" / "e" / f"seed_{seed}" / "splits.json").read_text())
        persons = [{subject[:-3] for subject in splits[side]} for side in ("train", "test")]
        assert not persons[0] & persons[1] and len(splits["test"]) == 4
    (tmp_path / "list.txt").write_text("upenn/UPENN-GBM-00000_21\nupenn/UPENN-GBM-00001_11\nupenn/UPENN-GBM-00001_21\n")
    base += ["--seeds", "0", "--test-subjects", str(tmp_path / "list.txt")]
    assert main(base) == 1
    error = capsys.readouterr().err
    assert "1 test subjects are also trained on, under another id: upenn/UPENN-GBM-00000_21." in error
    assert main([*base, "--allow-subject-leak"]) == 0
    with (tmp_path / "eval" / "knn_sequence" / "summary.tsv").open(newline="") as handle:
        stamps = {row["pretraining_overlap"] for row in csv.DictReader(handle, delimiter="\t")}
    assert stamps == {"unknown: encoder e has no pretrained_on.tsv; subject leak: 1 trained on under another id"}
