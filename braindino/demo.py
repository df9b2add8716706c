"""``braindino demo``: the whole way on a simulated cohort, by the same commands that a user would type.

Every step is a program run on files; the commands are printed, and kept in ``commands.log`` of the output folder. A
second run goes on where the first was stopped, because each program does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from braindino.command_line import GOES_ON, command_line
from braindino.segmentation_scores import format_mean, read_scores
from braindino.steps import Step, program, run_steps, verb
from braindino.task_summary import read_task_summary

DATASET_ID = 901
DATASET = f"Dataset{DATASET_ID}_SimulatedTumors"
TRAINER = "nnUNetTrainerBrainDINOFrozen_demo"
NUM_SLICES = 8


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Simulate, prepare, pretrain, segment, diagnose, report. Takes about ten minutes on two CPU cores."""

    out: Path = Path("demo")
    """Folder for everything; made when it is not there."""
    subjects: int = 16
    """Simulated subjects."""
    seed: int = 0
    """Seed of the cohort, the split and the trainings."""
    jobs: int = 2
    """Processes for simulation and preprocessing."""


@command_line("demo", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when every step succeeded, 1 when one failed; what was finished stays."""
    config = tyro.cli(Demo, args=argv, prog="braindino demo")
    out = config.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    headline = "The commands behind this folder, in order. All data are simulated."
    seconds = run_steps(build_steps(out, config), log_path=out / "commands.log", headline=headline)
    print(f"\nDone in {seconds:.0f} s, on simulated data.\n")
    print(results_table(out))
    print(f"\nReport: {out / 'report' / 'index.html'}")
    return 0


def build_steps(out: Path, config: Demo) -> list[Step]:
    """The commands of the demo, in order."""
    cohort, prepared, run, held_out = out / "cohort", out / "prepared", out / "pretrain", out / "held-out.txt"
    steps = [
        verb(
            f"Simulate {config.subjects} subjects",
            "simulate", "--out", cohort, "--subjects", config.subjects, "--seed", config.seed, "--jobs", config.jobs,
        ),
        verb(
            "Raw scans to slices", "prepare", cohort, "--out", prepared, "--skull-strip", "none", "--jobs", config.jobs
        ),
        verb(
            "Hold subjects out, once for every later step",
            "split", "--prepared", prepared, "--out", held_out, "--test-fraction", 0.3, "--seed", config.seed,
            "--participants", cohort / "participants.tsv", "--strata", "tumor",
        ),
        verb(
            "Pretrain a tiny ViT on the slices of the other subjects",
            "pretrain", "demo", "--store", prepared / "store", "--out", run, "--exclude-subjects", held_out,
            "--seed", config.seed,
        ),
    ]  # fmt: skip
    steps += _segmentation(out, cohort, held_out, run / "encoder")
    features = out / "features"
    for name, encoder in {
        "pretrained": run / "encoder",
        "untrained": f"untrained:{run / 'encoder'}",
        "intensity": "intensity",
    }.items():
        steps.append(
            verb(
                f"Features: {name}",
                "extract",
                "--prepared",
                prepared,
                "--encoder",
                encoder,
                "--out",
                features / name,
                "--options",
                f"num_slices={NUM_SLICES}",
            )
        )
    for task in ("sequence", "brain_age", "knn_sequence"):
        steps.append(
            verb(
                f"Evaluate: {task}",
                "evaluate",
                task,
                "--features",
                *(features / name for name in ("pretrained", "untrained", "intensity")),
                "--out",
                out / "eval",
                "--test-subjects",
                held_out,
                "--labels",
                cohort,
                "--ratios",
                0.4,
                1.0,
            )
        )
    steps.append(verb("Report", "report", out))
    return steps


def results_table(out: Path) -> str:
    """Every result of the demo beside its baseline, and the pretrained encoder beside the same encoder untrained."""
    rows = [("", "pretrained", "untrained", "baseline", "")]
    scores = {name: read_scores(out / "nnunet" / name / "scores.json").summary for name in ("pretrained", "untrained")}
    for region, row in scores["pretrained"].items():
        untrained = scores["untrained"][region]
        rows.append(
            (
                f"Dice, {region}",
                format_mean(row.mean, row.sd),
                format_mean(untrained.mean, untrained.sd),
                f"{row.floor:.3f}",
                "the whole brain",
            )
        )
    for task in ("sequence", "brain_age", "knn_sequence"):
        rows += _task_rows(task, out / "eval" / task / "summary.tsv")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _task_rows(task: str, summary: Path) -> list[tuple[str, str, str, str, str]]:
    """One row per metric at all labels: for kNN at its smallest neighbourhood."""
    lines = [line for line in read_task_summary(summary) if float(line["ratio"]) == 1.0]
    variant = lines[0]["variant"]
    cells: dict[str, dict[str, dict[str, str]]] = {}
    for line in lines:
        if line["variant"] == variant:
            cells.setdefault(line["metric"], {})[line["encoder"]] = line
    return [
        (
            " ".join(filter(None, (task, variant, metric))),
            _interval(by_encoder["pretrained"]),
            _interval(by_encoder["untrained"]),
            by_encoder["pretrained"]["baseline"],
            by_encoder["pretrained"]["baseline_name"],
        )
        for metric, by_encoder in cells.items()
    ]


def _segmentation(out: Path, cohort: Path, held_out: Path, pretrained: Path) -> list[Step]:
    """Convert, plan, then train and predict with each encoder, and score both."""
    root = out / "nnunet"
    folders = {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_n_proc_DA": "2",
        "nnUNet_def_n_proc": "1",
    }
    raw = root / "raw" / DATASET
    steps = [
        verb(
            "Tumour dataset for nnU-Net",
            "nnunet", "convert-bids", cohort, "--dataset-id", DATASET_ID, "--name", DATASET.split("_", 1)[1],
            "--test-subjects", held_out, "--pretrained-on", pretrained, environment=folders,
        ),
        program(
            "Plan and preprocess",
            "nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", "2d", "-np", 1, "-npfp", 1, environment=folders,
        ),
    ]  # fmt: skip
    encoders = {"pretrained": str(pretrained), "untrained": f"untrained:{pretrained}"}
    for name, encoder in encoders.items():
        # One results folder for each encoder: nnU-Net names folders by trainer, and both have the same.
        results = {**folders, "nnUNet_results": str(root / name / "results")}
        predictions = root / name / "predictions"
        steps += [
            program(
                f"Train nnU-Net on the frozen encoder: {name}",
                "nnUNetv2_train", DATASET_ID, "2d", 0, "-tr", TRAINER, "-device", "cpu", "--c",
                environment={**results, "BRAINDINO_ENCODER": encoder},
            ),
            program(
                f"Segment the held-out subjects: {name}",
                "nnUNetv2_predict", "-d", DATASET_ID, "-i", raw / "imagesTs", "-o", predictions, "-c", "2d", "-f", 0,
                "-tr", TRAINER, "-device", "cpu", "--disable_tta", "-npp", 1, "-nps", 1, environment=results,
            ),
        ]  # fmt: skip
    steps.append(
        verb(
            "Dice and HD95, side by side",
            "segment-eval", *(root / name / "predictions" for name in encoders), "--names", *encoders,
            "--references", raw / "labelsTs", "--out", root,
        )
    )  # fmt: skip
    return steps


def _interval(line: Mapping[str, str]) -> str:
    return f"{line['estimate']} [{line['low']}, {line['high']}]"
