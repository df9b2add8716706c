"""Predicting one 240x240x155 case of four channels: stock nnUNetv2_predict and braindino segment, the same network.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/segmentation_predict.py                ViT-S, 3 rounds
    OMP_WAIT_POLICY=PASSIVE python benchmarks/segmentation_predict.py --mirroring    mirroring on both sides

The case is noise in a brain-sized ellipsoid, the network has random weights: neither changes what is computed. Whole
programs are timed, from start to written labels, wall clock and processor time of all their processes; labels are
compared voxel by voxel. Rounds alternate the sides. ``stock`` runs with --disable_tta; ``defaults``, a further side, is
nnUNetv2_predict as called without options, with mirroring. On a GPU a first run of ours, not counted, brings the
libraries into memory.

--network times, in one process, what lies between preprocessing and export, too: from the preprocessed image to logits
on the host, the first run not counted. It is where the sides differ; starting up, reading, preprocessing and export are
most of a whole program's seconds on a GPU.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from braindino.vision_transformer import ARCHITECTURES
from braindino.volume import load_labels, save_array
from nnunet_braindino import _startup
from nnunet_braindino.predict import SlicePredictor
from nnunet_braindino.trainer import nnUNetTrainerBrainDINOFrozen

SHAPE = (240, 240, 155)
BRAIN = (137, 171, 140)  # voxels across, a typical BraTS crop
REGIONS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": [3]}
CHANNELS = {"0": "T1", "1": "T1c", "2": "T2", "3": "FLAIR"}
SIDES = ("stock", "ours", "defaults")
# What the installed programs call; packages in a folder on PYTHONPATH bring no programs.
OURS = ("-m", "braindino.cli", "segment")
STOCK = ("-c", "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as f; f()")


def write_case(folder: Path) -> None:
    rng = np.random.default_rng(0)
    grid = np.meshgrid(*(np.arange(n) - n / 2 for n in SHAPE), indexing="ij")
    inside = sum((axis / (width / 2)) ** 2 for axis, width in zip(grid, BRAIN, strict=True)) < 1
    for channel in range(len(CHANNELS)):
        image = np.where(inside, rng.normal(500, 120, SHAPE), 0)
        affine = np.diag([-1.0, -1.0, 1.0, 1.0])
        save_array(image, affine, folder / f"case_{channel:04d}.nii.gz", dtype=np.float32)


def write_model(folder: Path, model: str) -> Path:
    """As a training leaves it."""
    torch.manual_seed(0)
    encoder = ARCHITECTURES[model](layer_scale_init=1.0)
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    configuration: dict[str, object] = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [256, 256],
        "batch_size": 49,
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * len(CHANNELS),
        "use_mask_for_norm": [True] * len(CHANNELS),
        "batch_dice": True,
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    for name in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{name}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{name}_kwargs"] = {"is_seg": name == "seg", **resampling}
    plans = {
        "dataset_name": "Dataset001_Benchmark",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {key: {} for key in CHANNELS},
        "configurations": {"2d": configuration},
        "braindino": {"name": model, "sha256": "00" * 32, "architecture": encoder.architecture},
    }
    dataset = {
        "channel_names": CHANNELS,
        "labels": REGIONS,
        "regions_class_order": [2, 1, 3],
        "file_ending": ".nii.gz",
    }
    manager = PlansManager(plans)
    network = nnUNetTrainerBrainDINOFrozen.build_network_architecture(
        manager, manager.get_configuration("2d"), len(CHANNELS), 3, enable_deep_supervision=False
    )
    folder = folder / "nnUNetTrainerBrainDINOFrozen__nnUNetPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": network.state_dict(),
        "trainer_name": "nnUNetTrainerBrainDINOFrozen",
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def run(side: str, model: Path, images: Path, out: Path, *, mirroring: bool, device: str) -> tuple[float, float]:
    """Wall and processor seconds of one program."""
    if side == "ours":
        command = [*OURS, model, images, out, "--device", device]
        command += ["--mirroring"] if mirroring else []
    else:
        command = [*STOCK, "-m", model, "-i", images, "-o", out, "-f", "0", "-device", device]
        command += [] if mirroring or side == "defaults" else ["--disable_tta"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # In a folder without modules, which would come before the installed ones.
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=images,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{side}: exit code {done.returncode}")
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def time_network(model: Path, images: Path, *, mirroring: bool, device: str, rounds: int) -> dict[str, float]:
    """Median seconds of both sides from a preprocessed image to logits on the host; prints how the logits differ."""
    found: dict[str, list[float]] = {"stock": [], "ours": []}
    logits = {}
    with contextlib.redirect_stdout(io.StringIO()):
        kinds = {"stock": nnUNetPredictor, "ours": SlicePredictor}
        predictors = {
            side: kind(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False)
            for side, kind in kinds.items()
        }
        for predictor in predictors.values():
            predictor.initialize_from_trained_model_folder(str(model), (0,))
        plans, planned, dataset = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        files = sorted(map(str, images.iterdir()))
        data = torch.from_numpy(
            planned.preprocessor_class(verbose=False).run_case(files, None, plans, planned, dataset)[0]
        )
        for _ in range(1 + rounds):
            for side, predictor in predictors.items():
                start = time.perf_counter()
                logits[side] = predictor.predict_logits_from_preprocessed_data(data)  # on the host: nothing is pending
                found[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(seconds[1:]) for side, seconds in found.items()}
    ours, stock = (logits[side].float() for side in ("ours", "stock"))
    print(
        f"network alone, {tuple(data.shape)}: stock {medians['stock']:.3f} s, ours {medians['ours']:.3f} s: "
        f"{medians['stock'] / medians['ours']:.2f} times the seconds; logits differ by "
        f"{(ours - stock).abs().max():.2g} at most, of a standard deviation of {stock.std():.2g}, in sign at "
        f"{int(((ours > 0) != (stock > 0)).any(dim=0).sum())} voxels"
    )
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small", choices=sorted(ARCHITECTURES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", default=["stock", "ours"], choices=SIDES)
    parser.add_argument("--mirroring", action="store_true")
    parser.add_argument("--network", action="store_true", help="stock and ours without what surrounds the network, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the medians there, too")
    options = parser.parse_args()
    _startup.register()  # a folder on PYTHONPATH has no start-up file that Python reads
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", options.model)
        write_case(folder / "images")
        where = {"mirroring": options.mirroring, "device": options.device}
        rows: dict[str, dict[str, object]] = {}
        if options.network:
            alone = time_network(model, folder / "images", **where, rounds=options.rounds)
            rows = {f"{side}, network alone": {"seconds": seconds} for side, seconds in alone.items()}
        if options.device == "cuda" and options.sides:
            run("ours", model, folder / "images", folder / "first", **where)
        for _ in range(options.rounds):
            for side in options.sides:
                found[side].append(run(side, model, folder / "images", folder / side, **where))
        labels = {side: load_labels(folder / side / "case.nii.gz")[0] for side in options.sides}
    print(f"{options.model}, {SHAPE} x {len(CHANNELS)} channels, {options.device}, mirroring {options.mirroring}, "
          f"median of {options.rounds} rounds, torch {torch.__version__}")  # fmt: skip
    medians = {side: [statistics.median(column) for column in zip(*runs, strict=True)] for side, runs in found.items()}
    for side, (wall, processor) in medians.items():
        rows[f"{side}, whole program"] = {"seconds": wall}
        print(f"{side:<9} {wall:7.1f} s, {processor:7.1f} cpu s   of rounds: {found[side]}")
    for side in medians.keys() - {"ours"} if "ours" in medians else ():
        wall, processor = (a / b for a, b in zip(medians[side], medians["ours"], strict=True))
        different = int((labels[side] != labels["ours"]).sum())
        print(f"{side} / ours: {wall:.2f} times the seconds, {processor:.2f} times the cpu s; "
              f"{different} of {labels[side].size} voxels differ")  # fmt: skip
        rows[f"{side}, whole program"]["note"] = (
            f"{wall:.2f} times ours, {different} of {labels[side].size} voxels differ"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows))
    for side in options.sides[:1]:
        values, counts = np.unique(labels[side], return_counts=True)
        print("labels:", dict(zip(values.tolist(), counts.tolist(), strict=True)))


if __name__ == "__main__":
    main()
