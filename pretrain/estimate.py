"""What a run will cost, from a few real steps (`--dry-run`): time, memory, energy, and what limits its speed."""

import dataclasses
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from braindino.pretrain.config import ModelConfig, PretrainConfig
from braindino.pretrain.data import PREFETCH_FACTOR, Batch
from braindino.pretrain.distillation import build_student
from braindino.pretrain.schedules import effective_lr

WARM_UP_STEPS = 2
GIB = 2**30


@dataclass(frozen=True)
class Measurement:
    """What a stopwatch saw of one pair of crop sizes, in one process."""

    device: torch.device
    batch_size: int
    """Slices per step of this process."""
    compute_seconds: float
    """Mean time of a step after its batch has arrived."""
    load_seconds: float
    """Mean time in which the loader delivers a batch while nothing else runs."""
    peak_bytes: int
    """Most memory that torch held on the GPU, or most that the process held (resident set) on the CPU."""


class Stopwatch:
    """Lets a training loop run a few steps, then pulls further batches that nobody trains on; the times of both."""

    def __init__(self, steps: int, *, read_ahead: int) -> None:
        """read_ahead: batches that the loader holds ready; they are taken out before it is timed."""
        self.steps = steps
        self.read_ahead = read_ahead
        self.measurement: Measurement | None = None

    def watch(self, loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
        """The first batches of the loader, for the loop to train on, on that device."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batches = iter(loader)
        compute = []
        batch_size = 0
        for _ in range(WARM_UP_STEPS + self.steps):
            batch = next(batches, None)
            if batch is None:
                break
            batch_size = len(batch.slices)
            _wait_for(device)
            started = time.perf_counter()
            yield batch
            _wait_for(device)
            compute.append(time.perf_counter() - started)
        peak = _peak_bytes(device)
        if len(compute) <= WARM_UP_STEPS:
            raise ValueError(
                f"--dry-run: the run has {len(compute)} iterations; {WARM_UP_STEPS + 1} are needed, since the first "
                f"{WARM_UP_STEPS} are not timed"
            )
        for _ in range(self.read_ahead):
            next(batches, None)
        started, delivered = time.perf_counter(), 0
        while delivered < self.steps and next(batches, None) is not None:
            delivered += 1
        elapsed = time.perf_counter() - started
        timed = compute[WARM_UP_STEPS:]
        self.measurement = Measurement(
            device=device,
            batch_size=batch_size,
            compute_seconds=sum(timed) / len(timed),
            load_seconds=elapsed / delivered if delivered else 0.0,
            peak_bytes=peak,
        )


@dataclass(frozen=True)
class Estimate:
    """The cost of a run. Rates are of all processes together, memory is of each."""

    recipe: str
    iterations: int
    global_batch: int
    num_processes: int
    device: str
    lr_rule: str
    peak_lr: float
    encoder_parameters: int
    head_parameters: int
    """Of each of the two heads."""
    measured: tuple[tuple[tuple[int, int], float, Measurement], ...]
    """For each pair of crop sizes: (global, local) px, its probability, what was measured."""
    num_workers: int
    watts: float | None
    """Power limit of a GPU; None where nothing tells it."""

    def step_seconds(self, measurement: Measurement) -> float:
        """Time of one iteration: reading goes on beside computing if there are workers, before it if there are none."""
        parts = (measurement.compute_seconds, measurement.load_seconds)
        return max(parts) if self.num_workers else sum(parts)

    @property
    def seconds(self) -> float:
        """Time of the whole run, without checkpoints and probes."""
        return self.iterations * sum(share * self.step_seconds(one) for _, share, one in self.measured)

    @property
    def images_per_second(self) -> float:
        """Mean over the run."""
        return self.iterations * self.global_batch / self.seconds

    @property
    def model_rate(self) -> float:
        """Images/s if reading took no time."""
        return self.global_batch / sum(share * one.compute_seconds for _, share, one in self.measured)

    @property
    def loader_rate(self) -> float:
        """Slices/s that the loader delivers with nothing else running."""
        seconds = sum(share * one.load_seconds for _, share, one in self.measured)
        return self.global_batch / seconds if seconds else float("inf")

    @property
    def peak_bytes(self) -> int:
        """Of the pair that needs most."""
        return max(one.peak_bytes for _, _, one in self.measured)

    @property
    def device_hours(self) -> float:
        """Hours times processes."""
        return self.num_processes * self.seconds / 3600

    def lines(self) -> list[str]:
        """All of it as text."""
        student = self.encoder_parameters + 2 * self.head_parameters
        held = "allocated by torch on the GPU" if self.device == "cuda" else "resident set of the process"
        lines = [
            f"recipe {self.recipe}: {self.iterations} iterations of {self.global_batch} slices, "
            f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} on {self.device}",
            f"peak learning rate: {self.peak_lr:.3g} (rule {self.lr_rule}, global batch {self.global_batch})",
            f"parameters: student {student / 1e6:.2f} M (encoder {self.encoder_parameters / 1e6:.2f} M, two heads of "
            f"{self.head_parameters / 1e6:.2f} M); teacher as many",
        ]
        for (global_size, local_size), share, one in self.measured:
            lines.append(
                f"crops {global_size}/{local_size} px ({share:.0%} of the steps): "
                f"{one.compute_seconds:.3g} s a step, reading {one.load_seconds:.3g} s, "
                f"peak memory {one.peak_bytes / GIB:.2f} GiB"
            )
        lines += [
            f"model alone {self.model_rate:.4g} images/s, loader alone {self.loader_rate:.4g} slices/s: {self.limit()}",
            f"speed: {self.images_per_second:.4g} images/s",
            f"whole run: {duration(self.seconds)}, without checkpoints and probes",
            f"peak memory: {self.peak_bytes / GIB:.2f} GiB in each process ({held})",
            self._energy(),
        ]
        return lines

    def limit(self) -> str:
        """Whether the loader or the model decides the speed, and what to do."""
        if self.loader_rate >= 1.2 * self.model_rate:
            return "the model decides the speed"
        if not self.num_workers:
            return "reading takes a part of every step; give --num-workers 1 or more"
        if self.loader_rate >= self.model_rate:
            return "the loader only just keeps up; a --num-workers more would be safe"
        return "the loader decides the speed; give more --num-workers or a faster disk"

    def _energy(self) -> str:
        hours = f"{self.device_hours:.3g} device-hours"
        if self.watts is None:
            return f"energy: {hours} (no power limit is known for this device)"
        return f"energy: {hours}, {self.device_hours * self.watts / 1000:.3g} kWh at the limit of {self.watts:g} W each"


def estimate(config: PretrainConfig, *, recipe: str, run: Callable[[PretrainConfig, Stopwatch], None]) -> Estimate:
    """Measure a few steps of every pair of crop sizes, reckon what the run costs, and print it.

    Nothing is written to config.out. Among the processes of a run each calls this, and each has its own measurements.

    Args:
        config: of the run.
        recipe: name of its recipe.
        run: trains by a config on the batches that `Stopwatch.watch` yields of its loader, and returns when there are
            no more, without saving. It is given one pair of crop sizes at a time, and a folder that is removed
            afterwards.

    Raises:
        ValueError: the run is too short to be measured.
    """
    # Beside the run, where all its processes find it; what a dry run that was killed has left is removed.
    folders = {
        pair: config.out.with_name(f".{config.out.name}.dry-run-{pair}")
        for pair, share in enumerate(config.crops.pair_ratios)
        if share > 0
    }
    is_main = os.environ.get("RANK", "0") == "0"
    measured = []
    for pair, folder in folders.items():
        stopwatch = Stopwatch(config.dry_run_steps, read_ahead=PREFETCH_FACTOR * config.num_workers)
        crops = dataclasses.replace(
            config.crops,
            global_sizes=(config.crops.global_sizes[pair],),
            local_sizes=(config.crops.local_sizes[pair],),
            pair_ratios=(1.0,),
        )
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            run(dataclasses.replace(config, crops=crops, out=folder, checkpoint_every=config.iterations + 1), stopwatch)
        finally:
            if is_main:
                shutil.rmtree(folder, ignore_errors=True)
        assert stopwatch.measurement is not None
        measured.append((config.crops.sizes(pair), config.crops.pair_ratios[pair], stopwatch.measurement))
    first = measured[0][2]
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch = first.batch_size * num_processes
    encoder, head = count_parameters(config.model)
    result = Estimate(
        recipe=recipe,
        iterations=config.iterations,
        global_batch=global_batch,
        num_processes=num_processes,
        device=first.device.type,
        lr_rule=config.optimizer.lr_scaling,
        peak_lr=effective_lr(config.optimizer.base_lr, global_batch, scaling=config.optimizer.lr_scaling),
        encoder_parameters=encoder,
        head_parameters=head,
        measured=tuple(measured),
        num_workers=config.num_workers,
        watts=power_limit(first.device),
    )
    if is_main:
        print("dry run: nothing of it was kept", *result.lines(), sep="\n", flush=True)
    return result


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of the encoder and of one head; no memory is taken."""
    with torch.device("meta"):
        student = build_student(**dataclasses.asdict(model), seed=0)
    return tuple(  # type: ignore[return-value]
        sum(parameter.numel() for parameter in part.parameters()) for part in (student.encoder, student.dino_head)
    )


def power_limit(device: torch.device) -> float | None:
    """Watts that the GPU may draw, as nvidia-smi says; None on a CPU, or where it says nothing."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--id={uuid}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    try:
        return float(answer.stdout)
    except ValueError:  # "[N/A]", or a message when the driver does not answer
        return None


def duration(seconds: float) -> str:
    """`41 s`, `12 min`, `3.5 h` or `4.1 days`."""
    for unit, length, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
