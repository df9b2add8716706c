"""Time of a task's whole sweep of heads: 6 label ratios, 5 seeds, 5 folds, 1,000 subjects, 768 features.

    python benchmarks/heads.py [--quick] [--steps 500] [--batch-size 16] [--threads 2]

Ours: `train_many_heads`, all 150 heads. The other sides: `one by one`, a torch.nn.Sequential with torch.optim.Adam per
head on the same features, all threads on one head at a time, some of the 150 heads timed and scaled up; and
`re-encoding`, no features kept: every volume goes through the encoder at every epoch, as in the release of the paper (8
epochs, 128 slices a volume), forward time of ViT-B on a few slices times their number, an extrapolation. `--quick`
times a few heads on both sides, in one process, and scales ours up as well.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from braindino.downstream.head_pool import train_many_heads
from braindino.downstream.heads import DEFAULT_BATCH, Head, Training
from braindino.vision_transformer import vit_base

RATIOS, NUM_SEEDS, NUM_FOLDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), 5, 5
NUM_SUBJECTS, NUM_FEATURES = 1000, 768
RELEASE_EPOCHS, SLICES_PER_VOLUME, SLICE_SIZE = 8, 128, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few heads instead of all")
    parser.add_argument("--steps", type=int, default=Training().steps)
    parser.add_argument("--batch-size", type=int, default=DEFAULT_BATCH)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    features = rng.standard_normal((NUM_SUBJECTS, NUM_FEATURES)).astype(np.float32)
    classes = rng.integers(0, 2, NUM_SUBJECTS)
    training = Training(steps=arguments.steps, batch_size=arguments.batch_size)
    subsets = sweep(rng)
    # A head costs the same at every ratio: its steps are as many.
    some = subsets[:: len(subsets) // (2 if arguments.quick else 6)]
    chosen = some if arguments.quick else subsets

    # The first use of an optimiser imports much of torch.
    train_alone(features, classes, some[0], Training(steps=1, batch_size=arguments.batch_size))
    ours = timed(
        lambda: train_many_heads(
            features,
            classes,
            subsets=chosen,
            seeds=list(range(len(chosen))),
            num_outputs=2,
            head=Head(),
            training=training,
        )
    )
    naive = timed(lambda: [train_alone(features, classes, rows, training) for rows in some])
    encoder, count = vit_base().eval(), 2 if arguments.quick else 8
    slices = torch.randn(count, 3, SLICE_SIZE, SLICE_SIZE)
    with torch.inference_mode():
        encoder(slices)
        forward = timed(lambda: encoder(slices))
    visits = sum(map(len, subsets)) * RELEASE_EPOCHS + len(subsets) * NUM_SUBJECTS // NUM_FOLDS
    rows = {
        "ours" + (" (scaled up)" if arguments.quick else ""): ours * len(subsets) / len(chosen),
        "one by one (scaled up)": naive * len(subsets) / len(some),
        "re-encoding (extrapolated)": forward * visits * SLICES_PER_VOLUME / count,
    }
    print(
        f"{len(subsets)} heads, {training.steps} steps of {training.batch_size}, {arguments.threads} threads, torch "
        f"{torch.__version__}; timed: {len(chosen)} heads of ours, {len(some)} one by one, {count} slices of "
        f"{SLICE_SIZE} x {SLICE_SIZE}"
    )
    print(f"{'':28s} {'seconds':>12s} {'ours = 1':>12s}")
    first = next(iter(rows.values()))
    for name, seconds in rows.items():
        print(f"{name:28s} {seconds:12.1f} {seconds / first:12.1f}")


def sweep(rng: np.random.Generator) -> list[np.ndarray]:
    """The training rows of every head: nested ratios of what a fold leaves."""
    subsets = []
    for fold in np.array_split(rng.permutation(NUM_SUBJECTS), NUM_FOLDS):
        for _ in range(NUM_SEEDS):
            order = rng.permutation(np.setdiff1d(np.arange(NUM_SUBJECTS), fold))
            subsets += [order[: round(ratio * len(order))] for ratio in RATIOS]
    return subsets


def train_alone(features: np.ndarray, classes: np.ndarray, rows: np.ndarray, training: Training) -> np.ndarray:
    """Class probabilities of all subjects by one head of torch's own layers, optimiser and backward pass."""
    width = Head().hidden_width
    norm = nn.LayerNorm(NUM_FEATURES, elementwise_affine=False)
    head = nn.Sequential(norm, nn.Linear(NUM_FEATURES, width), nn.GELU(), nn.Linear(width, 2))
    optimiser = torch.optim.Adam(head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    x, y = torch.from_numpy(features), torch.from_numpy(classes)
    own = torch.from_numpy(rows)
    for _ in range(training.steps):
        batch = own[torch.randint(len(own), (training.batch_size or DEFAULT_BATCH,))]
        loss = nn.functional.cross_entropy(head(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.inference_mode():
        probabilities: np.ndarray = head(x).softmax(dim=-1).numpy()
    return probabilities


def timed(work: Callable[[], object]) -> float:
    """Wall seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
