"""Pretrain an encoder by self-distillation on the slices of a store.

    python pretrain/train.py RECIPE --store DIR --out RUN

Recipes are the starting points (stage1, stage2, debug, demo); every setting is a flag, and `--config FILE` lays the
settings of a YAML file over the recipe. `--dry-run` measures a few steps and says what the run will cost, without
touching RUN. Starting again with the same --out resumes. RUN then holds config.yaml,
run.json, metrics.jsonl, progress.png, checkpoints/ and encoder/ (the teacher, for `braindino.load_encoder`, and
pretrained_on.tsv, the scans that it has seen).
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from braindino import own_kernels
from braindino.allocation import give_back_large_arrays
from braindino.command_line import EXIT_ERROR, command_line
from braindino.leakage import Crosswalk
from braindino.lock import lock_folder
from braindino.metrics_log import append_metrics, drop_metrics_after, read_metrics
from braindino.pretrain.alarms import CollapseAlarms
from braindino.pretrain.checkpoint import Checkpoint, checkpoint_folder, load_newest_checkpoint, save_checkpoint
from braindino.pretrain.cohort_loss import CohortLoss
from braindino.pretrain.config import (
    PATCH_SIZE,
    PretrainConfig,
    SamplingConfig,
    config_to_dict,
    overlay,
)
from braindino.pretrain.data import BatchReader, build_loader, reading, split_batch
from braindino.pretrain.demo_data import make_demo_store
from braindino.pretrain.distillation import (
    build_student,
    build_teacher,
    collapse_indicators,
    expected_initial_loss,
)
from braindino.pretrain.distributed import (
    Division,
    MainProcessError,
    Processes,
    agree,
    all_reduce,
    join_processes,
    main_process_first,
    say,
    share_of,
)
from braindino.pretrain.estimate import Stopwatch, estimate
from braindino.pretrain.exclusion import read_exclusion
from braindino.pretrain.exposure import record_exposure
from braindino.pretrain.guards import StepGuard, suspects
from braindino.pretrain.initialization import resolve_layer_norm_eps, start_from
from braindino.pretrain.interruption import stop_on_signal
from braindino.pretrain.maps import TeacherMaps
from braindino.pretrain.optimizer import (
    build_adamw,
    clip_gradients,
    parameter_groups,
    set_rates,
    step_unless,
    update_teacher,
)
from braindino.pretrain.parallel import Distillation, Mode, choose_mode, load_optimizer_state, whole_state
from braindino.pretrain.probes import KnnProbe, NothingToAskError, read_probe_labels
from braindino.pretrain.progress import draw_progress
from braindino.pretrain.randomness import torch_generator
from braindino.pretrain.recipes import RECIPES
from braindino.pretrain.run_record import record_run
from braindino.pretrain.sampling import (
    SliceSampler,
    crop_pair_of_each_iteration,
    expected_shares,
    scan_weights,
    share_lines,
)
from braindino.pretrain.schedules import build_schedules, effective_lr
from braindino.pretrain.trackers import Trackers
from braindino.pretrain.views import build_views
from braindino.progress import track
from braindino.records import read_yaml
from braindino.slice_store import SliceStore
from braindino.splits import read_subjects
from braindino.vision_transformer import VisionTransformer
from braindino.weights import load_encoder, save_encoder

LOGGED_TERMS = ("loss", "dino", "dino_global", "dino_local", "ibot", "koleo")
# At the paper's temperatures it is below 1 %; the demo recipe's low temperature of the student makes 5 to 7 % of it.
MAX_INITIAL_DIFFERENCE = 0.1
NOT_FINITE = "loss or gradient is not finite"


@command_line("pretrain", errors=(FloatingPointError,), interrupted="the same command goes on from the last checkpoint")
def main(argv: Sequence[str] | None = None) -> int:
    """Run one pretraining command; the exit code (0 done or stopped on request, 1 error, 2 usage)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        recipe, config = parse_arguments([argument for argument in arguments if argument != "--dry-run"])
        if "--dry-run" in arguments:
            estimate(config, recipe=recipe, run=partial(pretrain, recipe=recipe))
        else:
            pretrain(config, recipe=recipe)
    except MainProcessError:
        return EXIT_ERROR
    return 0


def parse_arguments(arguments: Sequence[str]) -> tuple[str, PretrainConfig]:
    """Name of the recipe and the resolved settings: recipe, then --config FILE, then the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, rest = parser.parse_known_args(arguments)
    recipes = dict(RECIPES)
    if known.config is not None:
        values = read_yaml(known.config)
        recipes = {
            name: (text, overlay(config, values, source=str(known.config))) for name, (text, config) in RECIPES.items()
        }
    config = tyro.extras.overridable_config_cli(recipes, prog="pretrain", description=__doc__, args=rest)
    return next(argument for argument in rest if argument in recipes), config


def pretrain(config: PretrainConfig, stopwatch: Stopwatch | None = None, *, recipe: str) -> None:
    """Run or resume one pretraining run, in this process or together with the others that torchrun has started.

    With a stopwatch, only the steps that it measures, and without saving.

    Raises:
        ValueError: data or settings do not fit; OSError: a file cannot be read or written.
        FloatingPointError: loss or gradients were infinite or NaN too often in a row; names iterations and scans.
        MainProcessError: in all processes but the main one, which raises one of the above.
    """
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(config.device))
        stop = stack.enter_context(stop_on_signal())
        device = processes.device
        if device.type == "cpu":
            give_back_large_arrays()
        division = Division(processes.size, config.accumulate, config.batch_size)

        # ---- build: data
        with main_process_first(processes):
            if processes.is_main:
                stack.enter_context(lock_folder(config.out))
            if config.store is None:
                config = dataclasses.replace(config, store=make_demo_store(config.out.parent / "demo-data"))
            eps = resolve_layer_norm_eps(
                config.model.layer_norm_eps, source=config.init_from, config_path=config.out / "config.yaml"
            )
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, layer_norm_eps=eps))
            assert config.store is not None
            store = SliceStore(config.store)
            exclusion = None
            if lists := [path for path in (config.exclude_subjects, config.probe_subjects) if path is not None]:
                exclusion = read_exclusion(*lists, scans=store.scans, crosswalk=Crosswalk(config.crosswalk))
            weights = scan_weights(
                store.scans,
                by_cohort=config.sampling.by_cohort,
                by_sequence=config.sampling.by_sequence,
                excluded=exclusion.subjects if exclusion else frozenset(),
            )
            sampler = SliceSampler(
                store.scan_index, batch_size=division.global_batch, seed=config.seed, scan_weights=weights
            )
            pairs = crop_pair_of_each_iteration(config.iterations, config.crops.pair_ratios, seed=config.seed)
            sizes = [config.crops.sizes(pair) for pair in range(len(config.crops.pair_ratios))]
            reader = BatchReader(
                store,
                sampler,
                grids=[(global_size // PATCH_SIZE,) * 2 for global_size, _ in sizes],
                pairs=pairs,
                mask_probability=config.masks.probability,
                mask_ratios=config.masks.ratios,
                part=share_of(processes, division.global_batch),
            )
            if processes.is_main:
                record_run(
                    config,
                    recipe=recipe,
                    store_fingerprint=store.fingerprint,
                    num_slices=len(sampler.indices),
                    exclusion=exclusion,
                    division=division,
                )
            checkpoint = load_newest_checkpoint(config.out)
            start = checkpoint.iteration if checkpoint is not None else 0
        same_start(processes, start, config.out)

        # ---- build: student, teacher, optimiser, schedules
        student = build_student(**dataclasses.asdict(config.model), seed=config.seed).to(device)
        teacher = build_teacher(student, centering=config.loss.centering)
        if checkpoint is not None:
            student.load_state_dict(checkpoint.state["student"])
            teacher.load_state_dict(checkpoint.state["teacher"])
        elif config.init_from is not None:
            with main_process_first(processes):
                for line in start_from(student, teacher, config.init_from):
                    say(processes, line)
        student.encoder.checkpointing = config.activation_checkpointing
        if config.compile:
            for network in (student, teacher):
                network.encoder.compile_blocks()
        mode = choose_mode(config.parallel, processes, embed_dim=student.encoder.embed_dim)
        distillation = Distillation(student, teacher, mode=mode, processes=processes)
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
        gram_teacher = None
        logged_terms: tuple[str, ...] = LOGGED_TERMS
        if config.loss.gram_teacher is not None:
            gram_teacher = load_encoder(config.loss.gram_teacher).to(device)
            logged_terms = (*LOGGED_TERMS, "gram")
        guard = StepGuard(config.max_bad_steps, device)
        by_cohort = CohortLoss(store.scans, store.scan_index, device)
        if checkpoint is not None:
            load_optimizer_state(optimizer, checkpoint.state["optimizer"])
            guard.load_state_dict(checkpoint.state["guard"])
        peak_lr = effective_lr(config.optimizer.base_lr, division.global_batch, scaling=config.optimizer.lr_scaling)
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
        metrics_path = config.out / "metrics.jsonl"
        probe, maps, alarms, trackers = None, None, None, None
        with main_process_first(processes):
            if processes.is_main and stopwatch is None:
                probe = build_probe(config, store, sampler.indices, mode=mode)
                if config.probe_every and config.probe_maps and mode != "fsdp":
                    maps = TeacherMaps(config.out, store, sampler.indices, number=config.probe_maps, start=start)
                before = [row for row in read_metrics(metrics_path) if row["iteration"] <= start]
                alarms = CollapseAlarms(config.model.num_prototypes, before=before)
                trackers = stack.enter_context(
                    Trackers(
                        config.out,
                        tensorboard=config.tensorboard,
                        wandb_project=config.wandb_project,
                        config=config_to_dict(config),
                        start=start,
                    )
                )
        if processes.is_main:
            record_exposure(
                config.out / "encoder",
                store,
                sampler.indices,
                init_from=config.init_from,
                resumed=checkpoint is not None,
            )
            drop_metrics_after(metrics_path, start)
            describe(
                config,
                recipe=recipe,
                device=device,
                store=store,
                num_slices=len(sampler.indices),
                peak_lr=peak_lr,
                checkpoint=checkpoint,
                division=division,
                mode=mode,
            )
            for line in exclusion.lines() if exclusion else []:
                print(line, flush=True)
            if config.sampling != SamplingConfig():
                shares = expected_shares(store.scans, store.scan_index, weights)
                print(*share_lines(shares, draws=config.iterations * division.global_batch), sep="\n", flush=True)
        save = partial(
            save_run,
            config,
            recipe=recipe,
            processes=processes,
            division=division,
            distillation=distillation,
            optimizer=optimizer,
            guard=guard,
            store=store,
        )

        # ---- loop
        loader = build_loader(
            reader,
            range(start, config.iterations),
            num_workers=config.num_workers,
            pin_memory=device.type == "cuda",
        )
        student.train()
        last_logged, last_time = start, time.perf_counter()
        batches = stack.enter_context(reading(loader))
        if stopwatch is not None:
            batches = stopwatch.watch(batches, device)
        elif processes.is_main:
            batches = track(batches, total=config.iterations - start, desc="pretrain")
        for iteration, batch in enumerate(batches, start=start):
            done = iteration + 1
            parts = division.parts(processes.rank)
            micro_batches = [
                build_views(
                    micro_batch.slices,
                    micro_batch.masks,
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
                    part=part,
                    global_batch=division.global_batch,
                )
                for part, micro_batch in zip(parts, split_batch(batch, config.accumulate), strict=True)
            ]
            optimizer.zero_grad()
            objectives = []
            drawn = sampler.indices_of(iteration)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                targets = distillation.targets(
                    micro_batches,
                    temperature=float(schedules.teacher_temperature[iteration]),
                    sinkhorn_iterations=config.loss.sinkhorn_iterations,
                    centre_momentum=config.loss.centre_momentum,
                    gram_teacher=gram_teacher,
                )
            for part, views, target in zip(parts, micro_batches, targets, strict=True):
                with distillation.accumulating(last=part is parts[-1]):
                    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                        objective = distillation.objective(
                            views,
                            target,
                            student_temperature=config.loss.student_temperature,
                            ibot_weight=config.loss.ibot_weight,
                            koleo_weight=config.loss.koleo_weight,
                            gram_weight=config.loss.gram_weight,
                            generator=torch_generator(config.seed, iteration, f"drop path from slice {part.start}"),
                        )
                    (objective.loss / config.accumulate).backward()
                by_cohort.add(drawn[part], objective.dino_per_slice)
                objectives.append(torch.stack([getattr(objective, name).detach().float() for name in logged_terms]))
            terms = torch.stack(objectives).mean(dim=0)
            norms = torch.stack(clip_gradients(modules.values(), max_norm=config.optimizer.clip_norm))
            skip = guard.check(iteration, terms, norms)
            set_rates(
                optimizer,
                lr=float(schedules.lr[iteration]),
                last_layer_lr=float(schedules.last_layer_lr[iteration]),
                weight_decay=float(schedules.weight_decay[iteration]),
            )
            step_unless(optimizer, skip)
            update_teacher(teacher, student, momentum=float(schedules.momentum[iteration]), skip=skip)

            # ---- look: here, and only here, the host waits for the device and the processes for each other
            is_last = done == config.iterations
            save_now = stopwatch is None and (done % config.checkpoint_every == 0 or is_last)
            probe_now = bool(config.probe_every) and done % config.probe_every == 0
            look_now = done % config.log_every == 0 or done == 1 or save_now or probe_now
            if not (look_now or (stop and processes.size == 1)):
                continue
            stopping = bool(agree([bool(stop)], device)[0])
            save_now = save_now or stopping
            findings = guard.look()
            if processes.is_main:
                for bad in findings.skipped:
                    print(f"iteration {bad + 1} skipped: {NOT_FINITE}; {suspects(reader, bad)}", flush=True)
            if findings.stop_at is not None:
                save(iteration=findings.stop_at)
                if not processes.is_main:
                    raise MainProcessError
                raise FloatingPointError(
                    f"from iteration {findings.stop_at + 1} on {NOT_FINITE}, more than {config.max_bad_steps} times in "
                    f"a row. Of the first, {suspects(reader, findings.stop_at)}. The state before it is saved in "
                    f"{checkpoint_folder(config.out, findings.stop_at)}. Look at these scans, or start anew with a "
                    "lower learning rate"
                )

            # ---- log
            indicators = collapse_indicators(objective)
            shared = all_reduce(
                torch.cat([terms, torch.stack([value.float() for value in indicators.values()])]), "mean"
            )
            now = time.perf_counter()
            rate = (done - last_logged) / (now - last_time)
            last_logged, last_time = done, now
            row = {
                "iteration": done,
                **dict(zip([*logged_terms, *indicators], shared.tolist(), strict=True)),
                **dict(zip([f"grad_norm_{name}" for name in modules], norms.tolist(), strict=True)),
                **by_cohort.look(),
                "lr": float(schedules.lr[iteration]),
                "last_layer_lr": float(schedules.last_layer_lr[iteration]),
                "weight_decay": float(schedules.weight_decay[iteration]),
                "momentum": float(schedules.momentum[iteration]),
                "teacher_temperature": float(schedules.teacher_temperature[iteration]),
                "crop_sizes": list(sizes[pairs[iteration]]),
                "skipped_steps": findings.total,
                "slices_per_second": round(rate * division.global_batch, 2),
                "eta_seconds": round((config.iterations - done) / rate, 1),
            }
            if done == 1 and not findings.last_is_bad:
                num_images = 2 * division.global_batch
                row["expected_initial_loss"] = expected_initial_loss(
                    config.model.num_prototypes,
                    masked_fraction=int(num_images * config.masks.probability) / num_images,
                    ibot_weight=config.loss.ibot_weight,
                    koleo_weight=config.loss.koleo_weight,
                    koleo=row["koleo"],
                )
                say(
                    processes,
                    f"initial loss {row['loss']:.3f}; expected {row['expected_initial_loss']:.3f} "
                    f"(ln K terms + {config.loss.koleo_weight:g} x KoLeo {row['koleo']:.3f})",
                )
                off = abs(row["loss"] / row["expected_initial_loss"] - 1)
                # Heads that come from another run have preferences from the start.
                if off > MAX_INITIAL_DIFFERENCE and config.init_from is None:
                    say(
                        processes,
                        f"NOTICE: the initial loss is {off:.0%} off what an untrained network has (more than "
                        f"{MAX_INITIAL_DIFFERENCE:.0%}); look at the temperatures and at the intensities of the slices",
                    )
            # The terms of a skipped step are no numbers, and were said above.
            if processes.is_main and not findings.last_is_bad:
                if config.probe_every and (probe_now or is_last or done == 1):
                    if probe is not None:
                        row |= probe.measure(teacher.encoder, device)
                    if maps is not None:
                        maps.look(teacher.encoder, done)
                    last_time += time.perf_counter() - now
                if alarms is not None and (raised := alarms.check(row)):
                    row["alarms"] = [alarm.kind for alarm in raised]
                    print(*(f"ALARM {alarm.message}" for alarm in raised), sep="\n", flush=True)
                append_metrics(metrics_path, row)
                if trackers is not None:
                    trackers.log(row)

            # ---- save
            if save_now:
                save(iteration=done)
                losses = (
                    f"loss {row['loss']:.3f} (DINO {row['dino']:.3f}, iBOT {row['ibot']:.3f}, KoLeo {row['koleo']:.3f})"
                )
                say(
                    processes,
                    f"iteration {done}: {'step skipped' if findings.last_is_bad else losses}, "
                    f"{row['slices_per_second']:g} slices/s, saved",
                )
                last_time = time.perf_counter()
            if stopping:
                name = stop.signal_name or "a signal to another process"
                say(processes, f"stopped by {name} after iteration {done}; the same command resumes")
                return
        if stopwatch is not None:
            return
        if start == config.iterations:
            state = whole_state(teacher.state_dict(), keep=processes.is_main)
            if processes.is_main:
                save_teacher_encoder(
                    config, recipe=recipe, iteration=start, encoder=teacher.encoder, teacher_state=state, store=store
                )
            say(processes, f"{config.out} is finished: all {start} iterations are done")
        say(processes, f"encoder: braindino.load_encoder({str(config.out / 'encoder')!r})")


def build_probe(config: PretrainConfig, store: SliceStore, usable: np.ndarray, *, mode: Mode) -> KnnProbe | None:
    """The probe of a run, or None, saying why, where its store or its processes do not allow one."""
    labels = read_probe_labels(config.probe_labels, store.scans)
    asked = None if config.probe_subjects is None else frozenset(read_subjects(config.probe_subjects))
    if not config.probe_every:
        return None
    if mode == "fsdp":
        print("no kNN probe: student and teacher are sharded", flush=True)
        return None
    try:
        probe = KnnProbe(
            store,
            usable,
            num_scans=config.probe_scans,
            k=config.probe_k,
            seed=config.seed,
            labels=labels,
            asked=asked,
        )
    except NothingToAskError as error:
        print(f"no kNN probe: {error}", flush=True)
        return None
    for line in probe.unasked:
        print(f"the kNN probe does not ask for {line}", flush=True)
    return probe


def describe(
    config: PretrainConfig,
    *,
    recipe: str,
    device: torch.device,
    store: SliceStore,
    num_slices: int,
    peak_lr: float,
    checkpoint: Checkpoint | None,
    division: Division,
    mode: Mode,
) -> None:
    """Say what is about to run."""
    kept_out = f" ({len(store) - num_slices} of excluded subjects left out)" if num_slices < len(store) else ""
    print(
        f"recipe {recipe}: {config.model.architecture}, K = {config.model.num_prototypes}, "
        f"{config.iterations} iterations of {division} on {device.type}{f', {mode}' if mode != 'alone' else ''}\n"
        f"slices: {num_slices} of {len(store.scans)} scans in {config.store}{kept_out}\n"
        f"peak learning rate {peak_lr:.3g} (base {config.optimizer.base_lr:g}, rule {config.optimizer.lr_scaling}, "
        f"global batch {division.global_batch})",
        flush=True,
    )
    if device.type == "cuda":
        print(own_kernels.explain(device), flush=True)
    if checkpoint is not None:
        print(f"resuming from {checkpoint.path}", flush=True)
        before = Division(**checkpoint.state["division"])
        if before != division:
            print(f"it was made with {before}: {division.difference(before)}", flush=True)


def save_run(
    config: PretrainConfig,
    *,
    recipe: str,
    processes: Processes,
    division: Division,
    iteration: int,
    distillation: Distillation,
    optimizer: torch.optim.Optimizer,
    guard: StepGuard,
    store: SliceStore,
) -> None:
    """Write the checkpoint, the teacher's encoder and the picture of the run's progress; all processes call it."""
    state = whole_state(
        {
            "student": distillation.student.state_dict(),
            "teacher": distillation.teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        keep=processes.is_main,
    )
    if not processes.is_main:
        return
    save_checkpoint(
        config.out,
        iteration=iteration,
        config=config_to_dict(config),
        state={**state, "guard": guard.state_dict(), "division": division._asdict()},
    )
    save_teacher_encoder(
        config,
        recipe=recipe,
        iteration=iteration,
        encoder=distillation.teacher.encoder,
        teacher_state=state["teacher"],
        store=store,
    )
    draw_progress(
        read_metrics(config.out / "metrics.jsonl"),
        config.out / "progress.png",
        num_prototypes=config.model.num_prototypes,
        title=f"{recipe}, {config.model.architecture}: {iteration} of {config.iterations} iterations",
    )


def save_teacher_encoder(
    config: PretrainConfig,
    *,
    recipe: str,
    iteration: int,
    encoder: VisionTransformer,
    teacher_state: dict[str, torch.Tensor],
    store: SliceStore,
) -> None:
    """Write the teacher's encoder to RUN/encoder; its parameters may be shards, those of `teacher_state` are whole."""
    with torch.device("meta"):
        whole = VisionTransformer(**encoder.architecture)
    prefix = "encoder."
    whole.load_state_dict(
        {name.removeprefix(prefix): value for name, value in teacher_state.items() if name.startswith(prefix)},
        assign=True,
    )
    save_encoder(
        whole,
        config.out / "encoder",
        data_fingerprint=store.fingerprint,
        notes=f"teacher after {iteration} iterations of pretraining recipe {recipe}",
    )


def same_start(processes: Processes, start: int, run_dir: Path) -> None:
    """Make sure that all processes go on from the same checkpoint.

    Raises:
        ValueError: they do not, as when the folder of the run is not the same on every node.
    """
    first, last = (int(agree([start], processes.device, kind)[0]) for kind in ("min", "max"))
    if first != last:
        raise ValueError(
            f"{run_dir}: the processes find different checkpoints there, after {first} to {last} iterations; give a "
            "folder on a file system that all nodes share"
        )


if __name__ == "__main__":
    raise SystemExit(main())
