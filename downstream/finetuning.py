"""Full fine-tuning (paper sec. 4.4): encoder and head are trained jointly, from volumes, on the cases, splits, seeds
and ratios of the frozen features beside them, with their head, loss and optimiser.

The activations of a batch of volumes fit into no GPU: 16 volumes of 128 slices are 2048 images. Each step therefore
goes through the encoder twice. First without gradients, to the features of the batch; from these, head and loss give
the gradient at the features. Then part by part with gradients; what the backward pass needs of one part is gone before
the next begins. The gradients are those of one large pass, since nothing in the encoder is random, and a loss that ties
all its cases together, such as Cox's, is computed on all of them.

The encoder stays in ``eval()``: no drop path, and the batch statistics of BrainMVP's norms stay those of its
pretraining, as a batch is never in one pass; all its weights are trained, the gains and shifts of those norms too.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from braindino.atomic import plain, replace_file
from braindino.downstream.cases import Cases
from braindino.downstream.heads import JointHead, check_joint
from braindino.downstream.protocols import Job
from braindino.downstream.scan_inputs import ScanInputs
from braindino.downstream.task_table import Task
from braindino.encoder_rates import ENCODER_RATE, LAYER_DECAY, encoder_rate
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.contract import Identity
from braindino.encoders.cube_encoder import CubeEncoder
from braindino.encoders.options import parse_options
from braindino.encoders.slice_encoder import BATCH_SIZE, SliceEncoder
from braindino.feature_table import slices_within
from braindino.manifest import Scan
from braindino.progress import track
from braindino.vision_transformer import VisionTransformer

SUFFIX = "-finetuned"
MAX_JOBS = 16
_DECISIVE = ("identity", "precision", "settings", "scans_sha256")

Piece = tuple[Scan, Tensor]
"""A scan and a part of its input: what goes through the encoder at once."""


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """How an encoder is trained jointly with the head. Head, loss, optimiser, the head's learning rate, its start and
    the order of the cases are the task's, as on frozen features.
    """

    options: tuple[str, ...] = ()
    """Of the encoder, NAME=VALUE, as for extract."""
    encoder_rate: float = ENCODER_RATE
    """Learning rate of the encoder as a share of the head's; of a ViT of slices (BrainDINO, DINOv3) that of its last
    block."""
    layer_decay: float = LAYER_DECAY
    """Rate of each block of such a ViT as a share of the one behind it. Other encoders have one rate."""
    steps: int | None = None
    """Optimiser steps; by default the task's."""
    batch_size: int | None = None
    """Cases per step; by default the task's: mostly 16, for Cox all that train. It costs time, not memory."""
    slices: int | None = None
    """Slices of each volume in a step, drawn anew every time; by default all. Predictions take all."""
    pass_size: int = BATCH_SIZE
    """Slices in one pass through the encoder: what GPU memory limits. An encoder of volumes takes one volume."""
    memory: float = 8.0
    """GB to keep prepared volumes in; those that find no room are prepared again at every use."""

    def __post_init__(self) -> None:
        if self.encoder_rate < 0 or not 0 < self.layer_decay <= 1 or self.memory < 0:
            raise ValueError(
                f"--finetuning: found encoder_rate {self.encoder_rate:g}, layer_decay {self.layer_decay:g}, memory "
                f"{self.memory:g}; expected 0 or more, above 0 and up to 1, 0 or more"
            )
        for name in ("steps", "batch_size", "slices", "pass_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--finetuning.{name.replace('_', '-')}: found {value}; expected 1 or more")

    @property
    def decisive(self) -> dict[str, Any]:
        """What the results depend on, JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in ("options", "pass_size", "memory")}


def settings_from(about: Mapping[str, Any]) -> Finetuning:
    """The settings that ``FineTuner.about`` tells of."""
    return Finetuning(options=tuple(about["options"]), **about["settings"])


def name_beside(identity: Identity, others: Mapping[str, Identity]) -> str:
    """What a fine-tuned encoder is called: after the features of the same encoder, or by its own name.

    Raises:
        ValueError: features of the same weights were prepared or read otherwise, so that a comparison with them would
            compare two things at once; or the name is taken.
    """
    same = [name for name, other in others.items() if other.sha256 == identity.sha256]
    equal = [name for name in same if others[name].key == identity.key]
    if same and not equal:
        other = others[same[0]]
        raise ValueError(
            f"--finetune: {same[0]} has the same weights, but was prepared as {other.preparation} and read as "
            f"{other.reading}; found {identity.preparation} and {identity.reading}; give --finetuning.options those "
            "of its extraction"
        )
    name = (equal[0] if equal else identity.name) + SUFFIX
    if name in others:
        raise ValueError(f"--finetune: there are features called {name}; rename their folder")
    return name


class FineTuner:
    """An encoder that is trained on a task, job by job, each time from its own weights.

    Attributes:
        name: of its results.
        identity: of the encoder before.
        about: JSON values: which encoder, which scans, how.
    """

    name: str
    identity: Identity
    about: dict[str, Any]

    def __init__(
        self,
        task: Task,
        cases: Cases,
        *,
        encoder: str,
        prepared_dir: Path,
        settings: Finetuning,
        beside: Mapping[str, Identity],
        device: torch.device,
    ) -> None:
        """
        Args:
            task: row of the table of tasks.
            cases: of the task.
            encoder: as ``load_volume_encoder`` takes it.
            prepared_dir: folder made by `braindino prepare`, with all scans of the cases.
            settings: how it is trained.
            beside: the encoders of the features that it is compared with.
            device: where.

        Raises:
            ValueError: there is no such encoder, it cannot be trained on this task or compared with the features, or
                the folder lacks a scan.
            FileNotFoundError: there is nothing at the encoder's path.
        """
        self._task, self._cases, self._device = task, cases, device
        found = load_volume_encoder(encoder, device=device, **parse_options(settings.options))
        if not isinstance(found, SliceEncoder | CubeEncoder) or found.network is None:
            raise ValueError(f"--finetune {encoder}: has no network, so there is nothing to train; leave it out")
        self._encoder, self._network = found, found.network
        self.identity = found.identity
        self.name = name_beside(self.identity, beside)
        self._pool, rows = _what_is_read(task, found)
        self._num_slices = 0 if rows is None else rows.stop - rows.start
        if settings.slices is not None and rows is None:
            raise ValueError(f"--finetuning.slices: {encoder} takes whole volumes; leave it out")
        self._settings = settings
        training = task.training
        self._training = replace(
            training, steps=settings.steps or training.steps, batch_size=settings.batch_size or training.batch_size
        )
        on_gpu = device.type == "cuda"
        # On a GPU the encoder rounds its input to bfloat16, which has fewer digits than the float16 that is kept.
        self._inputs = ScanInputs(
            found,
            prepared_dir,
            cases.all_scans,
            rows=rows or slice(None),
            dtype=torch.float16 if on_gpu else torch.float32,
            memory=settings.memory,
            jobs=min(MAX_JOBS, os.cpu_count() or 1) if on_gpu else 1,
        )
        self._start = {name: value.detach().clone() for name, value in self._network.state_dict().items()}
        self.about = {
            "encoder": encoder,
            "options": list(settings.options),
            "prepared_dir": str(prepared_dir.resolve()),
            "identity": asdict(self.identity),
            "precision": "bfloat16" if on_gpu else "float32",
            "settings": settings.decisive,
            "scans_sha256": self._inputs.digest(),
        }

    def differs_from(self, about: Mapping[str, Any]) -> list[str]:
        """What decides the results and is not as ``about`` of another run tells."""
        ours = plain(self.about)
        return [name for name in _DECISIVE if ours[name] != about[name]]

    def train(self, jobs: Sequence[Job], *, keep_in: Path | None, say: Callable[[str], None] = print) -> np.ndarray:
        """(jobs, n, K) outputs of each job's head for its test cases, for survival of its training cases too; NaN for
        the others.

        Args:
            jobs: what to train.
            keep_in: folder where each finished job is kept; those that it holds are not trained again.
            say: takes a line about what was done.

        Raises:
            ValueError: a loss is not finite (names the scans), a scan can no longer be used, or a pass does not fit
                into the GPU.
        """
        outputs = np.full((len(jobs), len(self._cases), self._task.target.num_outputs), np.nan, dtype=np.float32)
        waiting = []
        for number, job in enumerate(jobs):
            kept = None if keep_in is None else self._read(keep_in, job)
            if kept is None:
                waiting.append(number)
            else:
                outputs[number, self._predicted(job)] = kept
        say(f"{self.name}: {len(jobs) - len(waiting)} of {len(jobs)} trainings are there already; {self._told()}")
        work = self._train_all([(number, jobs[number]) for number in waiting], outputs, keep_in)
        try:
            for _ in track(work, total=len(waiting) * self._training.steps, desc=f"{self.name}, steps"):
                pass
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{self.name}: {error}; take a smaller --finetuning.pass-size than {self._settings.pass_size}; "
                "finished trainings are kept"
            ) from error
        if waiting and self._inputs.num_kept < len(self._inputs.scans):
            say(
                f"{self.name}: {self._inputs.num_kept} of {len(self._inputs.scans)} prepared volumes were kept in "
                "memory, the others prepared at every use; --finetuning.memory, in GB, makes more room"
            )
        return outputs

    def _told(self) -> str:
        """In words, how it is trained."""
        settings = self._settings
        decay = f", {settings.layer_decay:g} of it per block" if self._depth is not None else ""
        slices = "" if settings.slices is None else f", {settings.slices} slices of each volume"
        return (
            f"{self._training.steps} steps each, encoder at {settings.encoder_rate:g} of the head's rate{decay}"
            f"{slices}, {self.about['precision']} on {self._device}"
        )

    @property
    def _depth(self) -> int | None:
        """Blocks of a network whose layers have rates of their own."""
        return self._network.depth if isinstance(self._network, VisionTransformer) else None

    def _predicted(self, job: Job) -> np.ndarray:
        """Cases whose outputs are asked for; the risks of training cases decide who is of high risk."""
        return np.concatenate([job.train, job.test]) if self._task.target.kind == "survival" else job.test

    def _train_all(self, jobs: Sequence[tuple[int, Job]], outputs: np.ndarray, keep_in: Path | None) -> Iterator[None]:
        """Fill in the outputs of the jobs; yields after every optimiser step."""
        for number, job in jobs:
            self._network.load_state_dict(self._start)
            self._network.requires_grad_(True)
            head = JointHead(
                self._cases.targets,
                rows=job.train,
                seed=job.seed,
                num_features=self._encoder.dim if self._pool != "patches" else self._patch_width(job),
                num_outputs=self._task.target.num_outputs,
                head=self._task.head,
                training=self._training,
                device=self._device,
            )
            optimiser = self._optimiser(head)
            draw = torch.Generator().manual_seed(job.seed)
            for step, (places, rows) in enumerate(head.batches()):
                self._step(head, optimiser, places, rows, draw, where=f"job {number + 1}, step {step + 1}")
                yield
            asked = self._predicted(job)
            outputs[number, asked] = self._predict(head, asked)
            if keep_in is not None:
                self._write(keep_in, job, outputs[number, asked])

    def _optimiser(self, head: JointHead) -> torch.optim.Optimizer:
        """The task's, with the encoder's own rates."""
        by_rate: dict[float, list[Tensor]] = {}
        for name, parameter in self._network.named_parameters():
            rate = self._settings.encoder_rate
            if self._depth is not None:
                rate = encoder_rate(name, self._depth, share=rate, layer_decay=self._settings.layer_decay)
            by_rate.setdefault(rate * self._training.learning_rate, []).append(parameter)
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        return head.start_optimiser(groups)

    def _step(
        self,
        head: JointHead,
        optimiser: torch.optim.Optimizer,
        places: Tensor,
        rows: Tensor,
        draw: torch.Generator,
        *,
        where: str,
    ) -> None:
        """One step on the cases ``rows``. A case that the batch holds twice goes through the encoder once."""
        cases, place_of = rows.unique(return_inverse=True)
        chosen = self._draw_slices(cases.tolist(), draw)
        with torch.no_grad():
            tokens = torch.cat([self._encode(piece) for piece in self._pieces(cases.tolist(), chosen)])
        tokens.requires_grad_()
        features = self._fuse(tokens, cases.tolist())
        optimiser.zero_grad(set_to_none=False)
        if not head.backward(features[place_of.to(self._device)], places):
            raise self._not_finite(tokens, cases.tolist(), where)
        assert tokens.grad is not None
        start = 0
        for piece in self._pieces(cases.tolist(), chosen):
            part = self._encode(piece)
            part.backward(tokens.grad[start : start + len(part)])
            start += len(part)
        optimiser.step()

    def _predict(self, head: JointHead, rows: np.ndarray) -> np.ndarray:
        """(len(rows), K) outputs."""
        with torch.no_grad():
            tokens = torch.cat([self._encode(piece) for piece in self._pieces(rows.tolist())])
        if not tokens.isfinite().all():
            raise self._not_finite(tokens, rows.tolist(), "prediction")
        return head.predict(self._fuse(tokens, rows.tolist()))

    def _pieces(self, cases: Sequence[int], chosen: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """The inputs of the cases, scan by scan, in parts of one pass."""
        scans = [scan for case in cases for scan in self._cases.scans[case]]
        for scan, data in self._inputs.stream(scans):
            if isinstance(self._encoder, CubeEncoder):
                yield scan, data
                continue
            slices = data if chosen is None else data[chosen[scan.scan_id]]
            for part in slices.split(self._settings.pass_size):
                yield scan, part

    def _draw_slices(self, cases: Sequence[int], draw: torch.Generator) -> dict[str, Tensor] | None:
        """scan_id -> which of its slices are trained on, ascending; None for all."""
        count = self._settings.slices
        if count is None or count >= self._num_slices:
            return None
        scans = [scan for case in cases for scan in self._cases.scans[case]]
        return {s.scan_id: torch.randperm(self._num_slices, generator=draw)[:count].sort().values for s in scans}

    def _encode(self, piece: Piece) -> Tensor:
        """(slices, D) features of the slices of a part, (1, D) of a volume; float32."""
        scan, data = piece
        data = data.to(self._device, torch.float32)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            if isinstance(self._encoder, CubeEncoder):
                return self._encoder.volume_features(data[None], [scan.sequence]).float()
            found = self._encoder.slice_features(data)
            return (found.patches if self._pool == "patches" else found.cls).float()

    def _fuse(self, tokens: Tensor, cases: Sequence[int]) -> Tensor:
        """(cases, D), or (cases, S, D) for an attention head: as ``trials.case_features`` makes them of a table."""
        counts = [len(self._cases.scans[case]) for case in cases]
        of_scans = tokens.unflatten(0, (sum(counts), -1))
        if self._task.head.kind != "attention":
            of_scans = of_scans.mean(dim=1)
        return torch.stack([of_case.mean(dim=0) for of_case in of_scans.split(counts)])

    def _patch_width(self, job: Job) -> int:
        """Patch tokens need not be as wide as the feature."""
        with torch.no_grad():
            return self._encode(next(self._pieces([int(job.train[0])]))).shape[1]

    def _not_finite(self, tokens: Tensor, cases: Sequence[int], where: str) -> ValueError:
        """The scans whose features are not finite, or all of the batch where the head's outputs are not."""
        scans = [scan for case in cases for scan in self._cases.scans[case]]
        bad = [
            scan
            for scan, of_scan in zip(scans, tokens.detach().unflatten(0, (len(scans), -1)), strict=True)
            if not of_scan.isfinite().all()
        ]
        what = "features are not finite" if bad else "the loss is not finite, the features are"
        paths = [scan.path for scan in bad or scans]
        return ValueError(
            f"{self.name}, {where}: {what}; scans {', '.join(paths[:10])}{' ...' if len(paths) > 10 else ''}. Look at "
            "them, or take a smaller --finetuning.encoder-rate"
        )

    def _key(self, job: Job) -> str:
        """64 hexadecimal digits that change with everything that decides the outputs of a job."""
        task, cases = self._task, self._cases
        facts: list[Any] = [self.about[name] for name in _DECISIVE]
        facts += [asdict(part) for part in (task.inputs, task.target, task.head, self._training)]
        facts.append(job.seed)
        for rows in (job.train, job.test):
            facts.append([[cases.targets[row].tolist(), [s.scan_id for s in cases.scans[row]]] for row in rows])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _read(self, folder: Path, job: Job) -> np.ndarray | None:
        """The outputs of a finished job; None where there are none, or those of something else."""
        path = _job_path(folder, job)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("key") != self._key(job):
                    return None
                outputs: np.ndarray = file.get_tensor("outputs")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, and the job is trained again") from error
        return outputs

    def _write(self, folder: Path, job: Job, outputs: np.ndarray) -> None:
        with replace_file(_job_path(folder, job)) as temporary:
            save_file({"outputs": np.ascontiguousarray(outputs)}, temporary, metadata={"key": self._key(job)})


def _what_is_read(task: Task, encoder: SliceEncoder | CubeEncoder) -> tuple[str, slice | None]:
    """The pool, ``cls``, ``patches`` or ``global``, and which slices it is of; None for an encoder of volumes.

    Raises:
        ValueError: the task cannot be trained jointly, or the encoder does not have its pool.
    """
    inputs, name = task.inputs, encoder.identity.name
    if task.knn is not None:
        raise ValueError(
            f"--finetune: task {task.name} looks for nearest neighbours; there is no head that an encoder could be "
            "trained with; leave it out"
        )
    check_joint(task.head, task.training)
    attends = task.head.kind == "attention"
    if isinstance(encoder, CubeEncoder):
        if attends or (inputs.pool != "global" and inputs.volume_pool != "global"):
            raise ValueError(
                f"--finetune: {name} takes whole volumes, and task {task.name} reads slices (pool {inputs.pool}, head "
                f"{task.head.kind}); expected an encoder of slices"
            )
        return "global", None
    pool = "cls" if inputs.pool == "global" else inputs.pool
    return pool, slices_within(inputs.slice_range, encoder.preparation.num_slices)


def _job_path(folder: Path, job: Job) -> Path:
    return folder / f"split-{job.split}_seed-{job.seed}_ratio-{job.ratio:g}.safetensors"
