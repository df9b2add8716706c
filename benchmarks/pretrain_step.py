"""One training step, ours beside others: seconds, processor seconds, peak memory, where the time goes; ratios last.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/pretrain_step.py                        CPU: ViT-S, 16 slices
    python benchmarks/pretrain_step.py --model vit_base --batch 256 --steps 20        a GPU: the paper's setting

Each side runs in a process of its own, on the same model size, crops (2 x 256, 8 x 112), masks, prototypes, drop path:

    ours     what pretrain/train.py does
    plain    the step as one would first write it: timm's ViT with drop path by multiplication, a pass per crop size,
             all logits held, softmax and Sinkhorn-Knopp on them, AdamW, moving average in a loop over parameters
    lightly  lightly-train's DINOv2 step (pretrain_step_lightly.py): --lightly-python PATH, a Python that has it
    dinov3   the official step (pretrain_step_dinov3.py): --dinov3 PATH, a checkout of facebookresearch/dinov3

The slices are noise in the shape of a brain: a step takes the same time whatever it shows. On a shared machine
processor time (of all threads, system included) is the steadier witness: run with OMP_WAIT_POLICY=PASSIVE, else waiting
threads count. --rounds alternates the sides and takes the median of their rounds.
"""

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from braindino.allocation import give_back_large_arrays
from braindino.pretrain import distillation
from braindino.pretrain.distillation import build_student, build_teacher, distillation_objective, teacher_targets
from braindino.pretrain.losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from braindino.pretrain.masking import batch_masks
from braindino.pretrain.optimizer import build_adamw, clip_gradients, parameter_groups, set_rates, update_teacher
from braindino.pretrain.randomness import numpy_generator, torch_generator
from braindino.pretrain.views import Views, build_views

SIDES = ("ours", "plain", "lightly", "dinov3")
NUM_LOCAL = 8
TIMM_NAMES = {"vit_small": "vit_small_patch16_dinov3", "vit_base": "vit_base_patch16_dinov3"}


class Clock:
    """Seconds per stage; waits for the device at every border, so the sum is more than an undisturbed step takes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.on = device, defaultdict[str, float](float), False

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


class Feed:
    """What a loader's workers hand over, made before: slices and masks, in pinned memory for a GPU."""

    DIFFERENT = 3

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        self.batches = [self.batch(index) for index in range(self.DIFFERENT)]

    def batch(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.options.batch
        slices = torch.zeros(count, 256, 256, dtype=torch.float16)
        slices[:, 40:216, 60:196] = torch.randn(count, 176, 136, generator=torch_generator(0, index, "slices")).half()
        grid = (self.options.crops[0] // 16,) * 2
        masks = torch.from_numpy(batch_masks(2 * count, grid, rng=numpy_generator(0, index, "masks")))
        return (slices.pin_memory(), masks.pin_memory()) if self.device.type == "cuda" else (slices, masks)

    def views(self, iteration: int) -> Views:
        options = self.options
        slices, masks = self.batches[iteration % self.DIFFERENT]
        return build_views(
            slices,
            masks,
            sizes=tuple(options.crops),
            num_local=NUM_LOCAL,
            global_scale=(0.32, 1.0),
            local_scale=(0.05, 0.32),
            aspect=(3 / 4, 4 / 3),
            canvas_size=256 if options.crops[0] <= 256 else 1024,
            flip_probability=0.5,
            blur_probabilities=(0.0, 0.9, 0.5),
            blur_sigma=(0.1, 2.0),
            generator=torch_generator(0, iteration, "crops"),
            device=self.device,
        )


def our_step(options: argparse.Namespace, device: torch.device, clock: Clock) -> Callable[[int], None]:
    if device.type == "cpu":
        give_back_large_arrays()
    student = build_student(
        options.model,
        num_storage_tokens=4,
        layer_scale_init=1e-5,
        drop_path=options.drop_path,
        num_prototypes=options.prototypes,
        head_hidden_dim=2048,
        head_bottleneck_dim=256,
        seed=0,
    ).to(device)
    teacher = build_teacher(student)
    student.train()
    student.encoder.checkpointing = options.checkpointing
    if options.compile:
        for network in (student, teacher):
            network.encoder.compile_blocks()
    heads = [student.dino_head, student.ibot_head]
    optimizer = build_adamw(
        parameter_groups(student.encoder, heads, layer_decay=0.9, patch_embed_multiplier=0.2), betas=(0.9, 0.999)
    )
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    # Stages inside the objective, by the functions that it calls.
    student.encoder.forward_read = clock.around("student forward", student.encoder.forward_read)
    teacher.encoder.forward_read = clock.around("teacher", teacher.encoder.forward_read)
    for name in ("prototype_loss", "sinkhorn_offset", "koleo_loss"):
        setattr(distillation, name, clock.around("heads and losses", getattr(distillation, name)))

    feed = Feed(options, device)

    def step(iteration: int) -> None:
        with clock.stage("views"):
            views = feed.views(iteration)
        with autocast():
            (targets,) = teacher_targets(teacher, [views], temperature=0.05, sinkhorn_iterations=3)
            objective = distillation_objective(
                student,
                views,
                targets,
                student_temperature=0.1,
                ibot_weight=1.0,
                koleo_weight=0.1,
                generator=torch_generator(0, iteration, "drop path"),
            )
        optimizer.zero_grad()
        with clock.stage("backward"):
            objective.loss.backward()
        with clock.stage("clip and AdamW"):
            clip_gradients([student.encoder, *heads], max_norm=3.0)
            set_rates(optimizer, lr=1e-4, last_layer_lr=1e-4, weight_decay=0.04)
            optimizer.step()
        with clock.stage("moving average"):
            update_teacher(teacher, student, momentum=0.994)

    return step


class PlainHead(nn.Module):
    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        sizes = (width, 2048, 2048)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(2048, 256))
        self.last = nn.Linear(256, prototypes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.normalize(self.mlp(x), dim=-1))


class PlainNetwork(nn.Module):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        import timm

        self.encoder = timm.create_model(
            TIMM_NAMES[options.model], num_classes=0, drop_path_rate=options.drop_path, dynamic_img_size=True
        )
        width = self.encoder.num_features
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.dino_head, self.ibot_head = PlainHead(width, options.prototypes), PlainHead(width, options.prototypes)

    def tokens(self, images: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """CLS (B, D) and patches (B, N, D)."""
        encoder = self.encoder
        x = encoder.patch_embed(images.expand(-1, 3, -1, -1))
        if mask is not None:
            x = torch.where(mask.view(*x.shape[:-1], 1), self.mask_token.to(x.dtype), x)
        x, rope = encoder._pos_embed(x)
        for block in encoder.blocks:
            x = block(x, rope=rope)
        x = encoder.norm(x)
        return x[:, 0], x[:, encoder.num_prefix_tokens :]


def plain_step(options: argparse.Namespace, device: torch.device, clock: Clock) -> Callable[[int], None]:
    torch.manual_seed(0)
    student, teacher = PlainNetwork(options).to(device), PlainNetwork(options).to(device)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.04)
    batch = options.batch

    feed = Feed(options, device)

    def step(iteration: int) -> None:
        with clock.stage("views"):
            views = feed.views(iteration)
        assert views.local_crops is not None
        masked = views.masks.flatten()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            with clock.stage("teacher"), torch.no_grad():
                cls, patches = teacher.tokens(views.global_crops)
            with clock.stage("heads and losses"), torch.no_grad():
                q_cls = sinkhorn_knopp(teacher.dino_head(cls), temperature=0.05)
                q_patches = sinkhorn_knopp(teacher.ibot_head(patches.flatten(0, 1)[masked]), temperature=0.05)
            with clock.stage("student forward"):
                cls, patches = student.tokens(views.global_crops, views.masks)
                local_cls, _ = student.tokens(views.local_crops)
            with clock.stage("heads and losses"):
                s_cls = student.dino_head(torch.cat([cls, local_cls])).unflatten(0, (-1, batch))
                s_patches = student.ibot_head(patches.flatten(0, 1)[masked])
                loss = (
                    dino_loss(s_cls[:2], s_cls[2:], q_cls.unflatten(0, (2, batch))).loss
                    + ibot_loss(s_patches, q_patches, views.mask_weights, num_images=2 * batch)
                    + 0.1 * (koleo_loss(cls[:batch]) + koleo_loss(cls[batch:]))
                )
        optimizer.zero_grad()
        with clock.stage("backward"):
            loss.backward()
        with clock.stage("clip and AdamW"):
            for module in (student.encoder, student.dino_head, student.ibot_head):
                nn.utils.clip_grad_norm_(module.parameters(), 3.0)
            optimizer.step()
        with clock.stage("moving average"), torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.mul_(0.994).add_(theirs, alpha=0.006)

    return step


def measure(options: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    clock = Clock(device)
    step = {"ours": our_step, "plain": plain_step}[options.side](options, device, clock)
    for iteration in range(options.warmup):
        step(iteration)
    start, start_cpu = clock.now(), time.process_time()
    for iteration in range(options.steps):
        step(iteration)
    seconds = (clock.now() - start) / options.steps
    cpu_seconds = (time.process_time() - start_cpu) / options.steps
    if options.profile is not None:
        profile(step, options.profile.with_stem(f"{options.profile.stem}-{options.side}"))
    clock.on = True
    step(0)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {
        "device": name,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rate": options.batch / seconds,
        "peak_gb": peak,
        "stages": clock.seconds,
    }


def profile(step: Callable[[int], None], path: Path) -> None:
    """Write which operations and kernels the time of a step goes to."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        step(0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    tables = [
        profiler.key_averages(group_by_input_shape=shapes).table(sort_by=key, row_limit=80, max_name_column_width=60)
        for shapes in (False, True)
    ]
    path.write_text("\n\n".join(tables))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small", choices=sorted(TIMM_NAMES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--crops", type=int, nargs=2, default=[256, 112], metavar=("GLOBAL", "LOCAL"), help="px")
    parser.add_argument("--drop-path", type=float, default=0.2)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--sides", nargs="+", default=["ours", "plain"], choices=SIDES)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile instead of by its own kernels")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lightly-python", type=Path)
    parser.add_argument("--lightly-defaults", action="store_true", help="its shared head and moving centre")
    parser.add_argument("--dinov3", type=Path, help="checkout of facebookresearch/dinov3")
    parser.add_argument("--dinov3-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--profile", type=Path, help="time by operation of ours and plain: PATH-ours, PATH-plain")
    parser.add_argument("--json", type=Path, help="write the medians there, too")
    parser.add_argument("--side", choices=("ours", "plain"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    sides = [*options.sides]
    if options.crops != [256, 112] and (set(sides) - {"ours", "plain"} or options.lightly_python or options.dinov3):
        parser.error("--crops is for ours and plain; the other sides have 256 and 112 px")
    for name, needed in (("lightly", options.lightly_python), ("dinov3", options.dinov3)):
        if needed is None and name in sides:
            parser.error(f"side {name} needs {'--lightly-python' if name == 'lightly' else '--dinov3'} PATH")
        if needed is not None and name not in sides:
            sides.append(name)
    print(f"{options.model}, batch {options.batch}, {options.prototypes:,} prototypes, drop path {options.drop_path:g}")
    rounds: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            run = subprocess.run(command_of(side, options), stdout=subprocess.PIPE, text=True, check=False)
            if run.returncode:
                print(f"{side}: could not run", flush=True)
                continue
            result = json.loads(run.stdout.splitlines()[-1])
            rounds[side].append(result)
            stages = "".join(f"; {name} {seconds:.3f}" for name, seconds in result["stages"].items())
            print(
                f"{side:<8} {result['seconds']:8.3f} s a step, {result['cpu_seconds']:8.3f} s of processors, "
                f"{result['rate']:8.2f} images/s, peak {result['peak_gb']:.2f} GB ({result['device']}{stages})",
                flush=True,
            )
    keys = ("seconds", "cpu_seconds", "rate", "peak_gb")
    medians = {
        side: {key: statistics.median(result[key] for result in results) for key in keys}
        for side, results in rounds.items()
        if results
    }
    for side, result in medians.items():
        if side != "ours" and "ours" in medians:
            time_, cpu, memory = (result[key] / medians["ours"][key] for key in ("seconds", "cpu_seconds", "peak_gb"))
            print(f"{side} / ours: time {time_:.2f}, processors {cpu:.2f}, memory {memory:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(medians))


def command_of(side: str, options: argparse.Namespace) -> list[str]:
    """The process that measures one side."""
    if side in ("ours", "plain"):
        return [sys.executable, __file__, *sys.argv[1:], "--side", side]
    cuda = options.device != "cpu" and torch.cuda.is_available()
    interpreter = options.lightly_python if side == "lightly" else options.dinov3_python
    settings = ("model", "batch", "prototypes", "drop_path", "warmup", "steps")
    command = [str(interpreter), str(Path(__file__).with_name(f"pretrain_step_{side}.py"))]
    for name in settings:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--device", "cuda" if cuda else "cpu"]
    if side == "dinov3":
        return [*command, "--checkout", str(options.dinov3), *(["--compile"] if cuda else [])]  # its own default
    return [*command, *(["--lightly-defaults"] if options.lightly_defaults else [])]


if __name__ == "__main__":
    main()
