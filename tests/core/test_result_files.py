"""The small result files that rooms exchange: refused when they are something else."""

from pathlib import Path

import pytest

from braindino.metrics_log import append_metrics, drop_metrics_after, read_metrics
from braindino.segmentation_scores import RegionSummary, SegmentationScores, format_mean, read_scores, write_scores
from braindino.task_summary import COLUMNS, read_task_summary, write_task_summary

NAN = float("nan")


def test_scores_survive_a_round_trip_and_other_files_are_refused(tmp_path: Path) -> None:
    scores = SegmentationScores({"a": {"WT": 0.5, "ET": NAN}}, {"WT": RegionSummary(0.5, NAN, 1, 0.1)})
    write_scores(scores, tmp_path)
    back = read_scores(tmp_path / "scores.json")
    assert back.cases["a"]["WT"] == 0.5 and back.cases["a"]["ET"] != back.cases["a"]["ET"]
    assert back.summary["WT"].num_cases == 1 and back.summary["WT"].floor == 0.1
    (tmp_path / "other.json").write_text('{"version": 7}')
    with pytest.raises(ValueError, match=r"other.json: format version 7; .* expected the file that"):
        read_scores(tmp_path / "other.json")


def test_means_are_printed_with_what_is_known() -> None:
    assert [format_mean(0.8124, 0.0441), format_mean(0.5, NAN), format_mean(NAN, NAN)] == [
        "0.812 ± 0.044",
        "0.500",
        "–",
    ]


def test_a_task_summary_survives_a_round_trip_and_a_cut_one_is_refused(tmp_path: Path) -> None:
    row = {name: f"{name} value" for name in COLUMNS}
    write_task_summary(tmp_path / "summary.tsv", [row, row])
    assert read_task_summary(tmp_path / "summary.tsv") == [row, row]
    text = (tmp_path / "summary.tsv").read_text()
    (tmp_path / "summary.tsv").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="expected the table that `braindino evaluate` writes"):
        read_task_summary(tmp_path / "summary.tsv")


def test_metrics_keep_their_rows_and_forget_those_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2, 3):
        append_metrics(path, {"iteration": iteration, "loss": 1 / iteration})
    with path.open("a") as handle:
        handle.write('{"iteration": 4, "lo')  # a kill in the middle of a line
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2, 3]
    drop_metrics_after(path, 2)
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
