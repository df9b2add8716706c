"""Dice at equal training time: our trainers beside stock nnU-Net 2d, at 10 % and at 100 % of the labels.

    OMP_NUM_THREADS=1 python benchmarks/segmentation_dice.py 902 --encoder RUN/encoder --seconds 200 --out OUT
    braindino segment-eval OUT/r100/* --references $nnUNet_raw/Dataset902_OasisTissues/labelsTs --out OUT/r100-scores

DATASET is planned and preprocessed (2d), with test images in imagesTs. Each side trains in a process of its own for
--seconds of the processors (all its threads; loading and augmentation included, nnU-Net's validation and checkpoints
not), and so on a busy machine as long as on a quiet one. Learning rates follow the share of that time that is gone.
Everything else is equal: patches, slices per batch, the training cases of a label ratio, no mirroring in training or
prediction. Predictions of the test images go to OUT/rRATIO/SIDE, and training.json beside them says what was done.
With --conditions DIR (what `braindino perturb` made of imagesTs) every side also predicts DIR/CONDITION, to
OUT/rRATIO-conditions/CONDITION/SIDE, which `braindino segment-eval --conditions OUT/rRATIO-conditions` scores.

    stock      nnUNetTrainer: its own 2d network, SGD, deep supervision
    frozen     nnUNetTrainerBrainDINOFrozen
    fixed      nnUNetTrainerBrainDINOFrozenFixedFusion
    context    nnUNetTrainerBrainDINOContext
    finetune   nnUNetTrainerBrainDINOFinetune
    linear     nnUNetTrainerBrainDINOLinear

A finished side is kept; a second call does what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

STOCK = "stock"
OURS = {
    "frozen": "Frozen",
    "fixed": "FrozenFixedFusion",
    "context": "Context",
    "finetune": "Finetune",
    "linear": "Linear",
}
EPOCHS = 20
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=int)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--seconds", type=float, default=200.0, help="of the processors, per training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", default=[STOCK, "frozen", "fixed", "context", "finetune"])
    parser.add_argument("--percent", nargs="+", type=int, default=[10, 100], help="of the labels")
    parser.add_argument("--patch", nargs=2, type=int, default=[224, 192])
    parser.add_argument("--batch", type=int, default=4, help="slices")
    parser.add_argument("--conditions", type=Path, help="folder of perturbed copies of imagesTs")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "PERCENT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, percent = options.child[0], int(options.child[1])
        train_and_predict(options, side, percent, options.out / f"r{percent}" / side)
        return 0
    rows = []
    for percent in options.percent:
        for side in options.sides:
            told = options.out / f"r{percent}" / side / "training.json"
            if not told.exists():
                # nnU-Net's loader in the training process, so that its time counts.
                environment = os.environ | {"nnUNet_n_proc_DA": "0", "BRAINDINO_ENCODER": options.encoder}
                command = [sys.executable, __file__, *sys.argv[1:], "--child", side, str(percent)]
                subprocess.run(command, check=True, env=environment)
            rows.append((percent, side, json.loads(told.read_text())))
    print(f"{'labels':>6}  {'side':<10}{'cases':>6}{'iterations':>12}{'s of processors':>17}{'loss':>8}")
    for percent, side, row in rows:
        numbers = f"{row['cases']:>6}{row['iterations']:>12}{row['seconds']:>17.0f}{row['loss']:>8.3f}"
        print(f"{percent:>5} %  {side:<10}{numbers}")
    return 0


def train_and_predict(options: argparse.Namespace, side: str, percent: int, out: Path) -> None:
    """Train one side and segment the test images."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    from nnunet_braindino.predict import SlicePredictor

    name = convert_id_to_dataset_name(options.dataset)
    folder = Path(nnUNet_preprocessed) / name
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    if side == STOCK:
        plans["configurations"]["2d"].update(patch_size=options.patch, batch_size=options.batch)
    dataset = json.loads((folder / "dataset.json").read_text())
    torch.manual_seed(SEED)
    trainer = trainer_class(side, percent / 100, tuple(options.patch), options.batch)(
        plans, "2d", 0, dataset, torch.device("cpu")
    )
    trainer.num_epochs, trainer.num_val_iterations_per_epoch = EPOCHS, 1
    iterations, seconds, loss = train(trainer, options.seconds)
    predictor_class = nnUNetPredictor if side == STOCK else SlicePredictor
    predictor = predictor_class(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    network = trainer.network
    if side == STOCK:
        trainer.set_deep_supervision_enabled(False)
    predictor.manual_initialization(
        network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [network.state_dict()],
        dataset,
        type(trainer).__name__,
        None,
    )
    start = time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    predictor.predict_from_files_sequential(str(Path(nnUNet_raw) / name / "imagesTs"), str(out))
    row = {
        "side": side, "trainer": type(trainer).__name__, "percent": percent, "cases": len(trainer.do_split()[0]),
        "iterations": iterations, "seconds": seconds, "loss": loss, "prediction_seconds": time.process_time() - start,
        "patch": list(trainer.configuration_manager.patch_size), "batch": trainer.configuration_manager.batch_size,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "encoder": os.environ["BRAINDINO_ENCODER"],
    }  # fmt: skip
    if options.conditions is not None:
        for images in sorted(path for path in options.conditions.iterdir() if path.is_dir()):
            folder = options.out / f"r{percent}-conditions" / images.name / side
            folder.mkdir(parents=True, exist_ok=True)
            predictor.predict_from_files_sequential(str(images), str(folder))
    (out / "training.json").write_text(json.dumps(row, indent=2) + "\n")


def trainer_class(side: str, ratio: float, patch: tuple[int, int], batch: int) -> Any:
    """The side's trainer on a share of the training subjects, without mirroring, its results in memory only."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_braindino.trainer_variants import choose_cases, find_trainer

    base: Any = nnUNetTrainer if side == STOCK else find_trainer(f"nnUNetTrainerBrainDINO{OURS[side]}")

    class Timed(base):
        patch_size = patch
        largest_batch = batch

        def do_split(self) -> tuple[list[str], list[str]]:
            train, validation = super().do_split()
            return choose_cases(train, ratio), validation

        def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
            *others, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            self.inference_allowed_mirroring_axes = None
            return (*others, None)

    Timed.__name__ = f"{base.__name__}_timed_{round(100 * ratio)}"
    return Timed


def train(trainer: Any, budget: float) -> tuple[int, float, float]:
    """nnU-Net's ``run_training`` with epochs of equal processor time; iterations, seconds, the last epoch's loss."""
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    iterations, spent, loss = 0, 0.0, float("nan")
    for epoch in range(EPOCHS):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        outputs: list[dict] = []
        while not outputs or spent < (epoch + 1) * budget / EPOCHS:
            start = time.process_time()
            outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            spent += time.process_time() - start
        iterations += len(outputs)
        loss = float(sum(output["loss"] for output in outputs) / len(outputs))
        trainer.on_train_epoch_end(outputs)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()
    return iterations, spent, loss


if __name__ == "__main__":
    raise SystemExit(main())
