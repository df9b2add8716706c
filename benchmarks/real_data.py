"""The whole chain on real scans: HD-BET, one slice store, pretraining, frozen-encoder nnU-Net, sequence kNN, report.

    make real-data DATA=FOLDER

FOLDER holds the public scans that docs/real-data.md describes. Everything is written below --out, with the commands in
commands.log; the numbers for the document are printed last and kept in results.md.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from braindino.atomic import write_text
from braindino.manifest import mask_path, read_scans
from braindino.provenance import versions
from braindino.segmentation_scores import format_mean, read_scores
from braindino.splits import split_subjects, write_subjects
from braindino.steps import Step, program, run_steps, verb
from braindino.task_summary import read_task_summary
from braindino.volume import load_mask

DATASET_ID = 902
DATASET = f"Dataset{DATASET_ID}_OasisTissues"
TRAINER = "nnUNetTrainerBrainDINOFrozen_10epochs"
ENCODERS = ("pretrained", "untrained")
NUM_TEST = 4
REFERENCE_MASKS = {"raw_t1.nii.gz": "hdbet_mask_t1.nii.gz", "raw_fla.nii.gz": "hdbet_mask_fla.nii.gz"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        write_held_out(data, out / "held-out.txt")
        seconds = run_steps(
            build_steps(data, out), log_path=out / "commands.log", headline="The chain on real scans, in order."
        )
        text = results(data, out, seconds)
    except (ValueError, OSError) as error:
        print(f"real_data: {error}", file=sys.stderr)
        return 1
    write_text(out / "results.md", text)
    print("\n" + text)
    return 0


def write_held_out(data: Path, path: Path) -> None:
    """Four OASIS subjects and the BraTS patient: neither pretrained nor trained on."""
    oasis = [f"oasis-t1/{scan.name.split('_')[0]}" for scan in sorted((data / "oasis-t1").glob("*_SS.nii.gz"))]
    _, test = split_subjects(oasis, test_fraction=NUM_TEST / len(oasis), seed=0)
    write_subjects(path, [*test, "brats/BraTS-GLI-00001-000"], comment="held out of every training")


def build_steps(data: Path, out: Path) -> list[Step]:
    """The commands, in order."""
    prepared, run, held_out, root = out / "prepared", out / "pretrain", out / "held-out.txt", out / "nnunet"

    def prepare(title: str, source: str, *options: object) -> Step:
        return verb(
            title, "prepare", source, "--out", prepared, "--skull-strip", "hd-bet-offline", "--jobs", 1, *options
        )

    steps = [
        # The pattern starts above the patient's folder, so that the folder names the subject.
        prepare("One glioma patient, raw and stripped", str(data / "tcga*" / "*.nii.gz"), "--cohort-name", "tcga-lgg"),
        prepare("19 adults, T1", str(data / "oasis-t1"), "--sequence", "T1", "--subject-pattern", r"(?P<subject>\d+)_"),
        prepare("One BraTS patient", str(data / "brats")),
        prepare("Three single scans", str(data / "misc")),
        verb(
            "Pretrain a tiny ViT",
            "pretrain", "demo", "--store", prepared / "store", "--out", run, "--exclude-subjects", held_out,
        ),
    ]  # fmt: skip
    folders = {
        "nnUNet_raw": str(root / "raw"),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_n_proc_DA": "2",
        "nnUNet_def_n_proc": "1",
    }
    raw = root / "raw" / DATASET
    steps += [
        verb(
            "Tissue labels for nnU-Net",
            "nnunet", "convert-pairs", "--images", data / "oasis-t1" / "*_SS.nii.gz",
            "--labels", data / "oasis-t1" / "*_tissues.nii.gz", "--dataset-id", DATASET_ID,
            "--name", DATASET.split("_", 1)[1], "--channels", "T1", "--label-names", "CSF", "GM", "WM",
            "--test-subjects", held_out, "--cohort", "oasis-t1", environment=folders,
        ),
        program(
            "Plan and preprocess",
            "nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", "2d", "-np", 1, "-npfp", 1, environment=folders,
        ),
    ]  # fmt: skip
    for name, encoder in zip(ENCODERS, (str(run / "encoder"), f"untrained:{run / 'encoder'}"), strict=True):
        # One results folder for each encoder: nnU-Net names folders by trainer, and both have the same.
        results_dir = {**folders, "nnUNet_results": str(root / name / "results")}
        predictions = root / name / "predictions"
        steps += [
            program(
                f"Train on 15 brains: {name}",
                "nnUNetv2_train", DATASET_ID, "2d", "all", "-tr", TRAINER, "-device", "cpu", "--c",
                environment={**results_dir, "BRAINDINO_ENCODER": encoder},
            ),
            program(
                f"Segment 4 unseen brains: {name}",
                "nnUNetv2_predict", "-d", DATASET_ID, "-i", raw / "imagesTs", "-o", predictions, "-c", "2d",
                "-f", "all", "-tr", TRAINER, "-device", "cpu", "--disable_tta", "-npp", 1, "-nps", 1,
                environment=results_dir,
            ),
        ]  # fmt: skip
    steps.append(
        verb(
            "Dice and HD95, side by side",
            "segment-eval", *(root / name / "predictions" for name in ENCODERS), "--names", *ENCODERS,
            "--references", raw / "labelsTs", "--out", root,
        )
    )  # fmt: skip
    features = out / "features"
    for name, encoder in {
        **dict(zip(ENCODERS, (run / "encoder", f"untrained:{run / 'encoder'}"), strict=True)),
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
                "num_slices=32",
            )
        )
    steps.append(
        verb(
            "Which sequence is it? Nearest neighbours",
            "evaluate",
            "knn_sequence",
            "--features",
            *(features / name for name in (*ENCODERS, "intensity")),
            "--out",
            out / "eval",
            "--test-subjects",
            held_out,
            "--ratios",
            1.0,
            "--seeds",
            0,
        )
    )
    steps.append(verb("Report", "report", out))
    return steps


def results(data: Path, out: Path, seconds: float) -> str:
    """The numbers as Markdown."""
    scans = read_scans(out / "prepared" / "scans.tsv")
    done = [scan for scan in scans if scan.status == "done"]
    lines = [
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.",
        "",
        f"The whole chain took {seconds / 60:.0f} minutes.",
        "",
        f"Prepared: {len(done)} scans done, {sum(s.status == 'quarantined' for s in scans)} quarantined, "
        f"{sum(s.status == 'skipped' for s in scans)} skipped; {sum(s.num_slices for s in done)} slices in the store.",
        "",
        "| scan | HD-BET v1, one model, Dice with the given mask | seconds |",
        "|---|---|---|",
    ]
    for scan in done:
        reference = REFERENCE_MASKS.get(Path(scan.path).name)
        if reference:
            ours, given = load_mask(mask_path(out / "prepared", scan)), load_mask(Path(scan.path).with_name(reference))
            dice = 2 * np.count_nonzero(ours & given) / (np.count_nonzero(ours) + np.count_nonzero(given))
            lines.append(f"| `{Path(scan.path).name}` | {dice:.3f} | {scan.seconds:.0f} |")
    scores = {name: read_scores(out / "nnunet" / name / "scores.json").summary for name in ENCODERS}
    lines += [
        "",
        "| Dice, 4 unseen brains | pretrained encoder | untrained encoder | floor: the whole brain |",
        "|---|---|---|---|",
    ]
    for region, row in scores["pretrained"].items():
        cells = [format_mean(scores[name][region].mean, scores[name][region].sd) for name in ENCODERS]
        lines.append(f"| {region} | {cells[0]} | {cells[1]} | {row.floor:.3f} |")
    rows = read_task_summary(out / "eval" / "knn_sequence" / "summary.tsv")
    lines += ["", "| kNN, sequence | features | accuracy [95 %] | baseline |", "|---|---|---|---|"]
    lines += [
        f"| {row['variant']} | {row['encoder']} | {row['estimate']} [{row['low']}, {row['high']}] | "
        f"{row['baseline']} ({row['baseline_name']}) |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
