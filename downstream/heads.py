"""Light heads on frozen features (paper sec. 4.3): how they look, how they are trained, and the one entry that does it.

A sweep over seeds, folds and label ratios trains hundreds of independent small heads on the same cached features. On a
CPU one head's parameters, gradients and moments (8 MB for the paper's head) stay in the cache while it is trained, and
as many heads are trained at once as torch has threads. On another device the heads of a block go through one batched
computation. Each head is the one that it would be alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from braindino.downstream.attention_head import start_attention_head
from braindino.downstream.head_losses import GRADIENTS, batch_shares
from braindino.downstream.head_stack import HeadStack
from braindino.downstream.oversampling import oversample

LAYER_NORM_EPS = 1e-5
ROWS_AT_A_TIME = 2048
SCANS_AT_A_TIME = 64
HEADS_AT_A_TIME = 64
LOGISTIC_ITERATIONS = 10_000
OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
UPDATES = {"adam": adam, "adamw": adamw}


@dataclass(frozen=True, kw_only=True)
class Head:
    """What stands on the frozen features."""

    kind: Literal["mlp", "linear", "logistic", "attention"] = "mlp"
    """``mlp``: LayerNorm-Linear-GELU-Linear (paper sec. 4.3), the norm without gain and bias, which the layer behind it
    holds. ``linear``: LayerNorm-Linear. ``logistic``: L2 logistic regression (C = 1) to convergence on standardised
    features, for classes. ``attention``: the mlp on a mean of the slices weighted by softmax(w . LN(x_s)), instead of
    the paper's plain mean."""
    hidden_width: int = 672
    """Width of the hidden layer. The paper gives no width but says that 0.6 % of the parameters are trained; on
    768-dimensional ViT-B features 672 gives 0.60 % (640: 0.57 %, 768: 0.69 %)."""
    dropout: float = 0.0
    """Probability, on the input of the last linear layer: the hidden layer, or of a linear head the features after
    LayerNorm. The paper's IDH head has dropout without a rate (sec. 4.3.5); BrainIAC's code has 0.2 there."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"head.dropout: found {self.dropout}; expected a probability from 0 to below 1")
        if self.kind == "logistic" and self.dropout:
            raise ValueError("head.dropout: logistic regression has none; expected 0, or kind: linear")
        if self.hidden_width < 1:
            raise ValueError(f"head.hidden_width: found {self.hidden_width}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a head is trained. Logistic regression uses ``class_weights`` and ``smote`` alone."""

    loss: Literal["cross_entropy", "squared_error", "log_mixed", "cox"] = "cross_entropy"
    """Paper Eq. 4, 5, 9 and 11."""
    class_weights: Literal["", "balanced"] = ""
    """``balanced``: a case of a class counts n / (K n_class); the paper weights none."""
    optimiser: Literal["adam", "adamw"] = "adam"
    """Paper sec. 4.3 (Adam, whose weight decay is an L2 term) and 4.3.3 (AdamW)."""
    learning_rate: float = 1e-4
    """Paper sec. 4.3."""
    weight_decay: float = 1e-5
    """Paper sec. 4.3."""
    steps: int = 500
    """Optimiser steps, the same for every label ratio and never chosen by looking at the test set."""
    batch_size: int | None = None
    """Cases per step; None: 16, for ``cox`` the whole training set, so that a risk set holds everybody at risk."""
    smote: bool = False
    """Fill up the smaller classes with synthetic training cases (paper sec. 4.3.2, PPMI)."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"training.{name}: found {value}; expected 1 or more")
        if self.loss != "cross_entropy" and (self.smote or self.class_weights):
            raise ValueError(
                f"training.{'smote' if self.smote else 'class_weights'}: found loss {self.loss}; only classes "
                "(cross_entropy) can be balanced"
            )


DEFAULT_BATCH = 16


@dataclass(frozen=True)
class _Job:
    """One head: which rows of the pool it trains on, with targets as its loss takes them.

    Attributes:
        number: place among the outputs.
        seed: of its start and batches.
        rows: (r,) indices into the pool of features.
        targets: (r, K) of 0 and 1 for classes, (r,) or (r, 2).
        weights: (r,) of the cases.
    """

    number: int
    seed: int
    rows: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, rows: np.ndarray, targets: np.ndarray, *, number: int, seed: int, num_outputs: int, training: Training
    ) -> "_Job":
        """Of the head's own rows (r,), with targets as ``_prepare_targets`` makes them."""
        weights = torch.from_numpy(_case_weights(targets, num_outputs, training))
        own = torch.from_numpy(targets)
        if training.loss == "cross_entropy":
            own = F.one_hot(own, num_outputs).float()
        return cls(number, seed, torch.from_numpy(rows), own, weights)

    def batch(self, places: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Targets and shares of the cases at ``places`` (B,) among the rows, as losses of one head take them."""
        parts = self.targets[places], batch_shares(self.weights[places])
        y, w = (part.to(device)[None] for part in parts)
        return y, w


def train_heads(
    features: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_outputs: int,
    head: Head,
    training: Training,
    mask: np.ndarray | Tensor | None = None,
    queries: Sequence[np.ndarray] = (),
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Train one head per subset and return its outputs of all n rows, (M, n, K) float32, and of the rows of
    ``queries`` after them.

    Which rows a head never saw is the caller's split. Outputs are class probabilities, values in the target's unit, or
    risks (higher: an earlier event).

    Args:
        features: (n, D), or (n, S, D) per slice for an attention head.
        targets: (n,) class indices or values, or (n, 2) time and event; with an axis of M in front where every head
            has its own.
        subsets: for each of M heads the row indices that it is trained on.
        seeds: for each head the seed of its start and of its batches.
        num_outputs: number of classes K; 1 for values and risks.
        head: how it looks.
        training: how it is trained.
        mask: (n, S) bool, True where a slice is there; attention only.
        queries: blocks (q, D) or (q, S, D) of further rows, which nobody trains on and which have no target. Each block
            is computed by itself: a matrix product may round a row otherwise beside other rows, and no output shall
            depend, not even in its last bit, on what else is asked.
        device: where to train.

    Raises:
        ValueError: shapes, head and loss do not fit each other, a feature or target is not finite, or a head's
            training rows hold one class or no event; names the head.
    """
    x = np.asarray(features, dtype=np.float32)
    y = np.asarray(targets)
    seen = None if mask is None else np.asarray(mask, dtype=bool)
    subsets = [np.asarray(rows, dtype=np.int64) for rows in subsets]
    check_heads(x, y, mask=seen, subsets=subsets, seeds=seeds, num_outputs=num_outputs, head=head, training=training)
    blocks = [x, *(np.asarray(block, dtype=np.float32) for block in queries)]
    check_queries(blocks)
    if head.kind == "logistic":
        return _train_logistic(
            blocks,
            of_each_head(y, len(seeds), training),
            subsets=subsets,
            seeds=seeds,
            num_outputs=num_outputs,
            training=training,
        )

    own_y = of_each_head(y, len(seeds), training)
    prepared, shifts, scales = _prepare_targets(own_y, subsets, training)
    pool, jobs = list(blocks), []
    sizes = [len(block) for block in blocks]
    size = sum(sizes)
    for number, (rows, seed) in enumerate(zip(subsets, seeds, strict=True)):
        own_rows, own_targets = rows, prepared[number][rows]
        if training.smote:
            made, made_classes = oversample(x[rows], own_y[number][rows], seed=seed, whose=_whose(number, seed))
            pool.append(made)
            own_rows = np.concatenate([rows, np.arange(size, size + len(made))])
            own_targets = np.concatenate([own_targets, made_classes])
            size += len(made)
        jobs.append(
            _Job.of(own_rows, own_targets, number=number, seed=seed, num_outputs=num_outputs, training=training)
        )

    outputs = torch.empty(len(subsets), sum(sizes), num_outputs)
    features_of_all = torch.from_numpy(np.concatenate(pool)).to(device)
    if head.kind == "attention":
        present = None if seen is None else torch.from_numpy(seen).to(device)

        def run(block: list[_Job]) -> None:
            for job in block:
                outputs[job.number] = _train_attention(
                    features_of_all, present, job, sizes=sizes, num_outputs=num_outputs, head=head, training=training
                )
    else:
        normalised = F.layer_norm(features_of_all, features_of_all.shape[-1:], eps=LAYER_NORM_EPS)

        def run(block: list[_Job]) -> None:
            outputs[[job.number for job in block]] = _train_stack(
                normalised, block, sizes=sizes, num_outputs=num_outputs, head=head, training=training
            )

    _run_blocks(run, jobs, training, on_cpu=torch.device(device).type == "cpu")
    return _natural(outputs, training, shifts, scales)


def check_queries(blocks: Sequence[np.ndarray]) -> None:
    """Whether heads on the first block of rows can be asked for the others.

    Raises:
        ValueError: rows of another shape, or a value that is not finite.
    """
    for number, block in enumerate(blocks[1:]):
        if block.shape[1:] != blocks[0].shape[1:] or not np.isfinite(block).all():
            raise ValueError(
                f"queries, block {number}: shape {block.shape}, {np.count_nonzero(~np.isfinite(block))} values not "
                f"finite; expected rows of shape {blocks[0].shape[1:]} as in the features, all finite"
            )


def of_each_head(targets: np.ndarray, num_heads: int, training: Training) -> Sequence[np.ndarray]:
    """The targets of every head, which may be the same for all."""
    shared = targets.ndim == (2 if training.loss == "cox" else 1)
    return [targets] * num_heads if shared else list(targets)


def check_heads(
    features: np.ndarray,
    targets: np.ndarray,
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_outputs: int,
    head: Head,
    training: Training,
    mask: np.ndarray | None = None,
) -> None:
    """Whether ``train_heads`` can train these heads; arguments as there.

    Raises:
        ValueError: as ``train_heads``.
    """
    x, y = features, targets
    dims = 3 if head.kind == "attention" else 2
    if x.ndim != dims:
        form = "(n, S, D), a row per slice" if dims == 3 else "(n, D)"
        raise ValueError(f"features of shape {x.shape} for a head of kind {head.kind}; expected {form}")
    if head.kind == "logistic" and training.loss != "cross_entropy":
        raise ValueError(
            f"head of kind logistic with loss {training.loss}: logistic regression tells classes apart; expected "
            "cross_entropy, or kind: linear"
        )
    if head.kind == "attention" and training.smote:
        raise ValueError("training.smote with a head of kind attention: features of slices are not mixed; use mlp")
    if mask is not None and (head.kind != "attention" or mask.shape != x.shape[:2]):
        raise ValueError(
            f"mask of shape {mask.shape} for features {x.shape} and a head of kind {head.kind}; expected (n, S) and "
            "attention"
        )
    if mask is not None and not mask.any(axis=1).all():
        raise ValueError(f"mask: row {int(np.flatnonzero(~mask.any(axis=1))[0])} has no slice; expected one or more")
    there = x if mask is None else x[mask]
    if not np.isfinite(there).all() or not np.isfinite(y).all():
        raise ValueError("features or targets hold NaN or infinity; expected finite numbers; leave out such cases")
    shape = (len(x), 2) if training.loss == "cox" else (len(x),)
    if y.shape not in (shape, (len(seeds), *shape)):
        raise ValueError(f"targets of shape {y.shape} for loss {training.loss}; expected {shape}")
    if training.loss == "cross_entropy" and len(y) and (y.min() < 0 or y.max() >= num_outputs):
        raise ValueError(f"class indices from {y.min()} to {y.max()}; expected 0 to {num_outputs - 1}")
    if training.loss != "cross_entropy" and num_outputs != 1:
        raise ValueError(f"num_outputs {num_outputs} for loss {training.loss}; expected 1")
    if training.loss == "log_mixed" and y.min() < 0:
        raise ValueError(f"loss log_mixed: the smallest target is {y.min():g}; expected 0 or more, for log(1 + y)")
    if len(subsets) != len(seeds) or not len(seeds):
        raise ValueError(f"{len(subsets)} subsets and {len(seeds)} seeds; expected as many of each, one or more")
    for number, (rows, seed, own) in enumerate(zip(subsets, seeds, of_each_head(y, len(seeds), training), strict=True)):
        whose = _whose(number, seed)
        if not len(rows):
            raise ValueError(f"{whose}: no training case; use a larger label ratio")
        if training.loss == "cross_entropy" and len(np.unique(own[rows])) < 2:
            raise ValueError(
                f"{whose}: all {len(rows)} training cases are of class {own[rows][0]}; expected two classes or more; "
                "use a larger label ratio"
            )
        if training.loss == "cox" and not own[rows, 1].any():
            raise ValueError(
                f"{whose}: no event among {len(rows)} training cases; nothing can be learnt of the hazard; use a "
                "larger label ratio"
            )


def check_joint(head: Head, training: Training) -> None:
    """Whether the features of such a head can be trained with it.

    Raises:
        ValueError: the head is no network, or is to learn from synthetic features.
    """
    if head.kind == "logistic" or training.smote:
        found = "training.smote" if training.smote else "head.kind logistic"
        raise ValueError(
            f"{found}: needs features that stay as they are and cannot be trained jointly with an encoder; take a task "
            "of your own that extends this one, with kind: linear, or smote: false and class_weights: balanced"
        )


class JointHead:
    """A head of ``train_heads`` for features that are trained with it: the same start, batches, loss and outputs, and
    the gradient goes on to the features.
    """

    def __init__(
        self,
        targets: np.ndarray,
        *,
        rows: np.ndarray,
        seed: int,
        num_features: int,
        num_outputs: int,
        head: Head,
        training: Training,
        device: torch.device,
    ) -> None:
        """
        Args:
            targets: (n,) or (n, 2) of all cases, as for ``train_heads``.
            rows: those that are trained on.
            seed: of the head's start and of its batches.
            num_features: D.
            num_outputs: K.
            head: how it looks.
            training: how it is trained.
            device: of the features.

        Raises:
            ValueError: as ``train_heads`` and ``check_joint``.
        """
        check_joint(head, training)
        shape = (len(targets), 1, num_features) if head.kind == "attention" else (len(targets), num_features)
        x = np.broadcast_to(np.float32(0), shape)
        check_heads(x, targets, subsets=[rows], seeds=[seed], num_outputs=num_outputs, head=head, training=training)
        self._head, self._training, self._device = head, training, device
        prepared, self._shifts, self._scales = _prepare_targets([targets], [rows], training)
        self._job = _Job.of(rows, prepared[0][rows], number=0, seed=seed, num_outputs=num_outputs, training=training)
        self._dropper = [torch.Generator().manual_seed(seed)]
        self._width = head.hidden_width
        if head.kind == "attention":
            self._network = start_attention_head(
                seed, num_features=num_features, hidden_width=head.hidden_width, num_outputs=num_outputs
            ).to(device)
            self._parameters: list[Tensor] = list(self._network.parameters())
        else:
            self._width = head.hidden_width if head.kind == "mlp" else num_features
            self._stack = HeadStack(
                [seed],
                num_features=num_features,
                hidden_width=head.hidden_width if head.kind == "mlp" else None,
                num_outputs=num_outputs,
                device=device,
            )
            self._stack.flat.grad = self._stack.gradient
            self._parameters = [self._stack.flat]

    def start_optimiser(self, others: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The training's optimiser, for the head and for other groups of parameters, with rates ``lr`` of their own."""
        return _optimiser([{"params": self._parameters}, *others], self._training)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield of every step the (B,) places of its cases among ``rows``, and the cases themselves."""
        size = _batch_size(self._job, self._training)
        for places in _positions(self._job, size, self._training).split(size):
            yield places, self._job.rows[places]

    def backward(self, features: Tensor, places: Tensor) -> bool:
        """Fill in the gradients of the batch's loss; False, and no gradient, where the loss is not finite.

        Args:
            features: (B, D), or (B, S, D) for an attention head; what they were made of gets its gradient.
            places: of the batch, as ``batches`` gives them.
        """
        y, w = self._job.batch(places, self._device)
        kept = _dropped(self._dropper, len(places), self._width, self._head.dropout, self._device)
        loss_gradient = GRADIENTS[self._training.loss]
        if self._head.kind == "attention":
            outputs = self._network(features, None, None if kept is None else kept[0])[None]
        else:
            normalised = F.layer_norm(features[None], features.shape[-1:], eps=LAYER_NORM_EPS)
            outputs = self._stack.outputs(normalised, kept)
        if not outputs.isfinite().all():
            return False
        outputs.backward(loss_gradient(outputs.detach(), y, w))
        if self._head.kind != "attention":
            self._stack.backward(normalised.detach(), lambda z: loss_gradient(z, y, w), kept)
        return True

    def predict(self, features: Tensor) -> np.ndarray:
        """(n, K) outputs of features (n, D) or (n, S, D): probabilities, values or risks."""
        with torch.no_grad():
            if self._head.kind == "attention":
                outputs = self._network(features)
            else:
                outputs = self._stack.outputs(F.layer_norm(features, features.shape[-1:], eps=LAYER_NORM_EPS)[None])[0]
        return _natural(outputs.cpu()[None], self._training, self._shifts, self._scales)[0]


def _run_blocks(run: Callable[[list[_Job]], None], jobs: list[_Job], training: Training, *, on_cpu: bool) -> None:
    """Call ``run`` for blocks of heads: on a CPU one head a thread, otherwise many with equal batches."""
    if not on_cpu:
        by_size = defaultdict(list)
        for job in jobs:
            by_size[_batch_size(job, training)].append(job)
        for same in by_size.values():
            for start in range(0, len(same), HEADS_AT_A_TIME):
                run(same[start : start + HEADS_AT_A_TIME])
        return
    # One thread a head, always: a head's sums are then the same, bit by bit, however many heads and threads there are.
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            list(executor.map(run, [[job] for job in jobs]))
    finally:
        torch.set_num_threads(threads)


def _train_stack(
    normalised: Tensor, block: list[_Job], *, sizes: Sequence[int], num_outputs: int, head: Head, training: Training
) -> Tensor:
    """Train heads with batches of one size together; return (m, sum of sizes, K) on the CPU: of rows in blocks of these
    sizes."""
    device = normalised.device
    stack = HeadStack(
        [job.seed for job in block],
        num_features=normalised.shape[1],
        hidden_width=head.hidden_width if head.kind == "mlp" else None,
        num_outputs=num_outputs,
        device=device,
    )
    size = _batch_size(block[0], training)
    streams = [_positions(job, size, training) for job in block]
    # (steps, m, B, ...): what a step needs lies together, and nothing of it is left to be computed.
    rows, targets, weights = (
        torch.stack(
            [getattr(job, name)[stream].unflatten(0, (-1, size)) for job, stream in zip(block, streams, strict=True)],
            dim=1,
        )
        for name in ("rows", "targets", "weights")
    )
    every_batch = zip(*(part.to(device).unbind() for part in (rows, targets, batch_shares(weights))), strict=True)
    droppers = [torch.Generator().manual_seed(job.seed) for job in block]
    width = head.hidden_width if head.kind == "mlp" else normalised.shape[1]
    gradient = GRADIENTS[training.loss]
    # The optimiser as a function: the object of the same name takes 0.1 ms a step for what it looks up.
    update = partial(
        UPDATES[training.optimiser],
        params=[stack.flat],
        grads=[stack.gradient],
        exp_avgs=[torch.zeros_like(stack.flat)],
        exp_avg_sqs=[torch.zeros_like(stack.flat)],
        max_exp_avg_sqs=[],
        state_steps=[torch.zeros((), device=device)],
        fused=True,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        beta1=0.9,  # this and what follows: the defaults of torch's optimisers
        beta2=0.999,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )
    x = normalised.new_empty(len(block), size, normalised.shape[1])
    for rows_of_step, y, w in every_batch:
        torch.index_select(normalised, 0, rows_of_step.flatten(), out=x.view(-1, x.shape[-1]))
        kept = _dropped(droppers, size, width, head.dropout, device)
        stack.backward(x, lambda z, y=y, w=w: gradient(z, y, w), kept)  # type: ignore[misc]
        update()
    parts = [
        stack.outputs(part.expand(len(block), -1, -1)).cpu()
        for of_block in normalised[: sum(sizes)].split(list(sizes))
        for part in of_block.split(ROWS_AT_A_TIME)
    ]
    return torch.cat(parts, dim=1)


def _train_attention(
    features: Tensor,
    mask: Tensor | None,
    job: _Job,
    *,
    sizes: Sequence[int],
    num_outputs: int,
    head: Head,
    training: Training,
) -> Tensor:
    """Train one attention head; return (sum of sizes, K) on the CPU: of rows in blocks of these sizes, the first of
    which ``mask`` belongs to."""
    network = start_attention_head(
        job.seed, num_features=features.shape[-1], hidden_width=head.hidden_width, num_outputs=num_outputs
    ).to(features.device)
    optimiser = _optimiser(list(network.parameters()), training)
    size = _batch_size(job, training)
    dropper = [torch.Generator().manual_seed(job.seed)]
    for positions in _positions(job, size, training).split(size):
        rows = job.rows[positions].to(features.device)
        kept = _dropped(dropper, size, head.hidden_width, head.dropout, features.device)
        outputs = network(features[rows], None if mask is None else mask[rows], None if kept is None else kept[0])
        y, w = job.batch(positions, features.device)
        optimiser.zero_grad()
        outputs.backward(GRADIENTS[training.loss](outputs.detach()[None], y, w)[0])
        optimiser.step()
    parts = []
    with torch.inference_mode():
        for number, of_block in enumerate(features.split(list(sizes))):
            for start in range(0, len(of_block), SCANS_AT_A_TIME):
                some = slice(start, start + SCANS_AT_A_TIME)
                present = mask[some] if mask is not None and number == 0 else None
                parts.append(network(of_block[some], present).cpu())
    return torch.cat(parts)


def _train_logistic(
    blocks: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    num_outputs: int,
    training: Training,
) -> np.ndarray:
    # Where it is used: every process that trains heads would wait more than a second for it.
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = blocks[0]
    outputs = np.zeros((len(subsets), sum(map(len, blocks)), num_outputs), dtype=np.float32)
    for number, (rows, seed) in enumerate(zip(subsets, seeds, strict=True)):
        own, classes = x[rows], targets[number][rows]
        if training.smote:
            made, made_classes = oversample(own, classes, seed=seed, whose=_whose(number, seed))
            own, classes = np.concatenate([own, made]), np.concatenate([classes, made_classes])
        scaler = StandardScaler().fit(own)
        model = LogisticRegression(class_weight=training.class_weights or None, max_iter=LOGISTIC_ITERATIONS)
        model.fit(scaler.transform(own), classes)
        outputs[number][:, model.classes_] = np.concatenate(
            [model.predict_proba(scaler.transform(block)) for block in blocks if len(block)]
        )
    return outputs


def _optimiser(parameters: Sequence[Tensor] | Sequence[dict[str, Any]], training: Training) -> torch.optim.Optimizer:
    return OPTIMISERS[training.optimiser](
        parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )


def _batch_size(job: _Job, training: Training) -> int:
    if training.batch_size is None:
        return len(job.rows) if training.loss == "cox" else DEFAULT_BATCH
    return training.batch_size


def _positions(job: _Job, size: int, training: Training) -> Tensor:
    """(steps * size,) places in the job's rows: one shuffled pass after another."""
    generator = torch.Generator().manual_seed(job.seed)
    length, count = training.steps * size, len(job.rows)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-length // count))])[:length]


def _dropped(
    generators: list[torch.Generator], size: int, width: int, probability: float, device: torch.device
) -> Tensor | None:
    """(m, size, width) factors 0 or 1 / (1 - p), drawn by each head's own generator; None without dropout."""
    if not probability:
        return None
    kept = torch.stack([torch.rand(size, width, generator=generator) >= probability for generator in generators])
    return kept.to(device).float().div_(1 - probability)


def _prepare_targets(
    targets: Sequence[np.ndarray], subsets: Sequence[np.ndarray], training: Training
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Targets of all rows as each head learns them, and the shift and scale (M, 1) that lead back.

    Values are standardised with the training rows of each head: with Adam at 1e-4 an output near 50 years would not be
    reached in thousands of steps. Of log(1 + y) the mean alone is taken off, which Eq. 9 does not notice.
    """
    count = len(subsets)
    shifts, scales = np.zeros((count, 1)), np.ones((count, 1))
    if training.loss == "cross_entropy":
        return [y.astype(np.int64) for y in targets], shifts, scales
    prepared = []
    for number, (rows, y) in enumerate(zip(subsets, targets, strict=True)):
        values = y.astype(np.float64)
        if training.loss == "cox":
            # Ties of times survive in float32 only by their ranks.
            ranks = np.unique(values[:, 0], return_inverse=True)[1]
            prepared.append(np.stack([ranks, values[:, 1]], axis=1).astype(np.float32))
            continue
        if training.loss == "log_mixed":
            values = np.log1p(values)
        shifts[number] = values[rows].mean()
        if training.loss == "squared_error":
            scales[number] = values[rows].std() or 1.0
        prepared.append(((values - shifts[number]) / scales[number]).astype(np.float32))
    return prepared, shifts, scales


def _natural(outputs: Tensor, training: Training, shifts: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if training.loss == "cross_entropy":
        return outputs.softmax(dim=-1).numpy()
    values = outputs.numpy().astype(np.float64) * scales[..., None] + shifts[..., None]
    if training.loss == "log_mixed":
        values = np.expm1(values).clip(min=0)
    return values.astype(np.float32)


def _case_weights(classes: np.ndarray, num_classes: int, training: Training) -> np.ndarray:
    if not training.class_weights:
        return np.ones(len(classes), dtype=np.float32)
    counts = np.bincount(classes, minlength=num_classes)
    return (len(classes) / (num_classes * counts[classes])).astype(np.float32)


def _whose(number: int, seed: int) -> str:
    return f"head {number} (seed {seed})"
