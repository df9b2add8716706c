"""Pretrain an encoder by self-distillation on the slices of a store.

    python pretrain/train.py RECIPE --store DIR --out RUN

Recipes are the starting points (stage1, stage2, debug, demo); every setting is a flag, and `--config FILE` lays the
settings of a YAML file over the recipe. Starting again with the same --out resumes. RUN then holds config.yaml,
run.json, metrics.jsonl, progress.png, checkpoints/ and encoder/ (the teacher, for `braindino.load_encoder`, and
pretrained_on.tsv, the scans that it has seen).
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from braindino.lock import lock_folder
from braindino.metrics_log import append_metrics, drop_metrics_after, read_metrics
from braindino.pretrain.checkpoint import Checkpoint, checkpoint_folders, load_newest_checkpoint, save_checkpoint
from braindino.pretrain.config import PATCH_SIZE, PretrainConfig, config_to_dict, overlay, read_config_file
from braindino.pretrain.data import (
    BatchReader,
    SliceSampler,
    build_loader,
    crop_pair_of_each_iteration,
    read_exclusion,
    usable_slices,
)
from braindino.pretrain.demo_data import make_demo_store
from braindino.pretrain.distillation import (
    Network,
    build_student,
    build_teacher,
    collapse_indicators,
    distillation_objective,
    expected_initial_loss,
)
from braindino.pretrain.exposure import record_exposure
from braindino.pretrain.interruption import stop_on_signal
from braindino.pretrain.optimizer import build_adamw, clip_gradients, parameter_groups, set_rates, update_teacher
from braindino.pretrain.progress import draw_progress
from braindino.pretrain.randomness import torch_generator
from braindino.pretrain.recipes import RECIPES
from braindino.pretrain.run_record import record_run
from braindino.pretrain.schedules import build_schedules, effective_lr
from braindino.pretrain.views import build_views
from braindino.progress import track
from braindino.slice_store import SliceStore
from braindino.weights import save_encoder

LOGGED_TERMS = ("loss", "dino", "dino_global", "dino_local", "ibot", "koleo")
MAX_SCANS_NAMED = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one pretraining command; the exit code (0 done or stopped on request, 1 error, 2 usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        recipe, config = parse_arguments(arguments)
        if config.store is None:
            config = dataclasses.replace(config, store=make_demo_store(config.out.parent / "demo-data"))
        pretrain(config, recipe=recipe)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str]) -> tuple[str, PretrainConfig]:
    """Name of the recipe and the resolved settings: recipe, then --config FILE, then the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(arguments)
    recipes = dict(RECIPES)
    if known.config is not None:
        values = read_config_file(known.config)
        recipes = {
            name: (text, overlay(config, values, source=str(known.config))) for name, (text, config) in RECIPES.items()
        }
    config = tyro.extras.overridable_config_cli(recipes, prog="pretrain", description=__doc__, args=rest)
    return next(argument for argument in rest if argument in recipes), config


def pretrain(config: PretrainConfig, *, recipe: str) -> None:
    """Run or resume one pretraining run.

    Raises:
        ValueError: data or settings do not fit; OSError: a file cannot be read or written.
        FloatingPointError: the loss or a gradient became infinite or NaN; names the iteration and its scans.
    """
    assert config.store is not None
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and device.type != "cuda":
        raise ValueError("--device cuda: no CUDA device is available to torch here; use --device cpu or auto")

    with lock_folder(config.out), stop_on_signal() as stop:
        # ---- build: data
        store = SliceStore(config.store)
        exclusion = read_exclusion(config.exclude_subjects, store.scans) if config.exclude_subjects else None
        usable = usable_slices(store, exclusion.subjects if exclusion else frozenset())
        sampler = SliceSampler(store.scan_index, batch_size=config.batch_size, seed=config.seed, usable=usable)
        pairs = crop_pair_of_each_iteration(config.iterations, config.crops.pair_ratios, seed=config.seed)
        sizes = [config.crops.sizes(pair) for pair in range(len(config.crops.pair_ratios))]
        reader = BatchReader(
            store,
            sampler,
            grids=[(global_size // PATCH_SIZE,) * 2 for global_size, _ in sizes],
            pairs=pairs,
            mask_probability=config.masks.probability,
            mask_ratios=config.masks.ratios,
        )
        record_run(
            config, recipe=recipe, store_fingerprint=store.fingerprint, num_slices=len(usable), exclusion=exclusion
        )

        # ---- build: student, teacher, optimiser, schedules
        student = build_student(**dataclasses.asdict(config.model), seed=config.seed).to(device)
        teacher = build_teacher(student)
        modules = {"encoder": student.encoder, "dino_head": student.dino_head, "ibot_head": student.ibot_head}
        optimizer = build_adamw(
            parameter_groups(
                student.encoder,
                [student.dino_head, student.ibot_head],
                layer_decay=config.optimizer.layer_decay,
                patch_embed_multiplier=config.optimizer.patch_embed_lr_multiplier,
            ),
            betas=config.optimizer.betas,
        )
        peak_lr = effective_lr(config.optimizer.base_lr, config.batch_size, scaling=config.optimizer.lr_scaling)
        schedules = build_schedules(
            config.iterations,
            peak_lr=peak_lr,
            min_lr=config.optimizer.min_lr,
            warmup_iterations=config.optimizer.warmup_iterations,
            last_layer_freeze_iterations=config.optimizer.last_layer_freeze_iterations,
            weight_decay=config.optimizer.weight_decay,
            teacher_momentum=config.optimizer.teacher_momentum,
            teacher_temperature=config.loss.teacher_temperature,
            teacher_temperature_iterations=config.loss.teacher_temperature_iterations,
        )

        # ---- build: where to start
        checkpoint = load_newest_checkpoint(config.out)
        start = 0
        if checkpoint is not None:
            start = checkpoint.iteration
            student.load_state_dict(checkpoint.state["student"])
            teacher.load_state_dict(checkpoint.state["teacher"])
            optimizer.load_state_dict(checkpoint.state["optimizer"])
        elif config.init_from is not None:
            start_from_teacher(student, teacher, config.init_from)
        record_exposure(
            config.out / "encoder", store, usable, init_from=config.init_from, resumed=checkpoint is not None
        )
        metrics_path = config.out / "metrics.jsonl"
        drop_metrics_after(metrics_path, start)
        describe(
            config,
            recipe=recipe,
            device=device,
            store=store,
            num_slices=len(usable),
            peak_lr=peak_lr,
            checkpoint=checkpoint,
        )

        # ---- loop
        loader = build_loader(
            reader,
            range(start, config.iterations),
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
        )
        student.train()
        first_bad = torch.full((), -1, device=device)
        last_logged, last_time = start, time.perf_counter()
        batches = track(loader, total=config.iterations - start, desc="pretrain")
        for iteration, batch in enumerate(batches, start=start):
            done = iteration + 1
            views = build_views(
                batch.slices,
                batch.masks,
                sizes=sizes[pairs[iteration]],
                num_local=config.crops.num_local,
                global_scale=config.crops.global_scale,
                local_scale=config.crops.local_scale,
                aspect=config.crops.aspect,
                canvas_size=config.crops.canvas_size,
                flip_probability=config.crops.flip_probability,
                blur_probabilities=config.crops.blur_probabilities,
                blur_sigma=config.crops.blur_sigma,
                generator=torch_generator(config.seed, iteration, "crops"),
                device=device,
            )
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                objective = distillation_objective(
                    student,
                    teacher,
                    views,
                    teacher_temperature=float(schedules.teacher_temperature[iteration]),
                    student_temperature=config.loss.student_temperature,
                    sinkhorn_iterations=config.loss.sinkhorn_iterations,
                    ibot_weight=config.loss.ibot_weight,
                    koleo_weight=config.loss.koleo_weight,
                    generator=torch_generator(config.seed, iteration, "drop path"),
                )
            optimizer.zero_grad()
            objective.loss.backward()
            norms = torch.stack(clip_gradients(modules.values(), max_norm=config.optimizer.clip_norm))
            # Looked at when something is logged or saved: asking the device at every step would make it wait.
            bad = ~(torch.isfinite(objective.loss) & torch.isfinite(norms).all())
            first_bad = torch.where((first_bad < 0) & bad, iteration, first_bad)
            set_rates(
                optimizer,
                lr=float(schedules.lr[iteration]),
                last_layer_lr=float(schedules.last_layer_lr[iteration]),
                weight_decay=float(schedules.weight_decay[iteration]),
            )
            optimizer.step()
            update_teacher(teacher, student, momentum=float(schedules.momentum[iteration]))

            # ---- log
            is_last = done == config.iterations
            save_now = done % config.checkpoint_every == 0 or is_last or bool(stop)
            if done % config.log_every == 0 or done == 1 or save_now:
                scalars = {
                    **{name: getattr(objective, name) for name in LOGGED_TERMS},
                    **{f"grad_norm_{name}": norm for name, norm in zip(modules, norms, strict=True)},
                    **collapse_indicators(objective),
                }
                values = torch.stack([first_bad.float(), *(scalar.detach().float() for scalar in scalars.values())])
                _, *numbers = values.tolist()
                if (bad_iteration := int(first_bad)) >= 0:
                    raise FloatingPointError(non_finite_message(config.out, bad_iteration, reader))
                now = time.perf_counter()
                rate = (done - last_logged) / (now - last_time)
                last_logged, last_time = done, now
                row = {
                    "iteration": done,
                    **dict(zip(scalars, numbers, strict=True)),
                    "lr": float(schedules.lr[iteration]),
                    "last_layer_lr": float(schedules.last_layer_lr[iteration]),
                    "weight_decay": float(schedules.weight_decay[iteration]),
                    "momentum": float(schedules.momentum[iteration]),
                    "teacher_temperature": float(schedules.teacher_temperature[iteration]),
                    "crop_sizes": list(sizes[pairs[iteration]]),
                    "slices_per_second": round(rate * config.batch_size, 2),
                    "eta_seconds": round((config.iterations - done) / rate, 1),
                }
                if done == 1:
                    row["expected_initial_loss"] = expected_initial_loss(
                        config.model.num_prototypes,
                        masked_fraction=int(2 * config.batch_size * config.masks.probability) / (2 * config.batch_size),
                        ibot_weight=config.loss.ibot_weight,
                        koleo_weight=config.loss.koleo_weight,
                        koleo=row["koleo"],
                    )
                    print(
                        f"initial loss {row['loss']:.3f}; expected {row['expected_initial_loss']:.3f} "
                        f"(ln K terms + {config.loss.koleo_weight:g} x KoLeo {row['koleo']:.3f})",
                        flush=True,
                    )
                append_metrics(metrics_path, row)

            # ---- save
            if save_now:
                save(
                    config,
                    recipe=recipe,
                    iteration=done,
                    student=student,
                    teacher=teacher,
                    optimizer=optimizer,
                    store=store,
                )
                print(
                    f"iteration {done}: loss {row['loss']:.3f} (DINO {row['dino']:.3f}, iBOT {row['ibot']:.3f}, "
                    f"KoLeo {row['koleo']:.3f}), {row['slices_per_second']:g} slices/s, saved",
                    flush=True,
                )
                last_time = time.perf_counter()
            if stop:
                print(f"stopped by {stop.signal_name} after iteration {done}; the same command resumes", flush=True)
                return
        if start == config.iterations:
            save_teacher_encoder(config, recipe, start, teacher, store)
            print(f"{config.out} is finished: all {start} iterations are done", flush=True)
        print(f"encoder: braindino.load_encoder({str(config.out / 'encoder')!r})", flush=True)


def start_from_teacher(student: Network, teacher: Network, run_dir: Path) -> None:
    """Load the teacher of another run (encoder and both heads) into student and teacher.

    Raises:
        ValueError: that run has no sound checkpoint, or another architecture; names what differs.
    """
    checkpoint = load_newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(f"--init-from {run_dir}: no checkpoint there; give the folder of a pretraining run")
    weights = checkpoint.state["teacher"]
    expected = {name: tensor.shape for name, tensor in student.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"--init-from {checkpoint.path}: {len(differing)} parameters do not fit, first {name}: found "
            f"{tuple(found.get(name, ())) or 'none'}, expected {tuple(expected.get(name, ())) or 'none'}; "
            "use the same model settings as that run"
        )
    student.load_state_dict(weights)
    teacher.load_state_dict(weights)
    print(f"starting from the teacher of {checkpoint.path}", flush=True)


def describe(
    config: PretrainConfig,
    *,
    recipe: str,
    device: torch.device,
    store: SliceStore,
    num_slices: int,
    peak_lr: float,
    checkpoint: Checkpoint | None,
) -> None:
    """Say what is about to run."""
    kept_out = f" ({len(store) - num_slices} of excluded subjects left out)" if num_slices < len(store) else ""
    print(
        f"recipe {recipe}: {config.model.architecture}, K = {config.model.num_prototypes}, "
        f"{config.iterations} iterations of {config.batch_size} slices on {device.type}\n"
        f"slices: {num_slices} of {len(store.scans)} scans in {config.store}{kept_out}\n"
        f"peak learning rate {peak_lr:.3g} (base {config.optimizer.base_lr:g}, rule {config.optimizer.lr_scaling}, "
        f"batch {config.batch_size})",
        flush=True,
    )
    if checkpoint is not None:
        print(f"resuming from {checkpoint.path}", flush=True)


def save(
    config: PretrainConfig,
    *,
    recipe: str,
    iteration: int,
    student: Network,
    teacher: Network,
    optimizer: torch.optim.Optimizer,
    store: SliceStore,
) -> None:
    """Write the checkpoint, the teacher's encoder and the picture of the run's progress."""
    save_checkpoint(
        config.out,
        iteration=iteration,
        config=config_to_dict(config),
        state={
            "student": student.state_dict(),
            "teacher": teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
    )
    save_teacher_encoder(config, recipe, iteration, teacher, store)
    draw_progress(
        read_metrics(config.out / "metrics.jsonl"),
        config.out / "progress.png",
        num_prototypes=config.model.num_prototypes,
        title=f"{recipe}, {config.model.architecture}: {iteration} of {config.iterations} iterations",
    )


def save_teacher_encoder(
    config: PretrainConfig, recipe: str, iteration: int, teacher: Network, store: SliceStore
) -> None:
    """Write the teacher's encoder to RUN/encoder."""
    save_encoder(
        teacher.encoder,
        config.out / "encoder",
        data_fingerprint=store.fingerprint,
        notes=f"teacher after {iteration} iterations of pretraining recipe {recipe}",
    )


def non_finite_message(run_dir: Path, iteration: int, reader: BatchReader) -> str:
    """What to tell when the loss or a gradient of an iteration (counted from 0) is infinite or NaN."""
    paths = list(dict.fromkeys(scan.path for scan in reader.scans_of(iteration)))
    named = ", ".join(paths[:MAX_SCANS_NAMED]) + (
        f" and {len(paths) - MAX_SCANS_NAMED} more" if len(paths) > MAX_SCANS_NAMED else ""
    )
    saved = checkpoint_folders(run_dir)
    return (
        f"iteration {iteration + 1}: loss or gradient is not finite. Scans of its batch: {named}. Newest checkpoint, "
        f"from before it: {saved[0] if saved else 'none'}. Look at these scans, or lower the learning rate"
    )


if __name__ == "__main__":
    raise SystemExit(main())
