"""The tasks of the paper as a table: one frozen row each, read by ``evaluate``."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from braindino.downstream.heads import MlpHead
from braindino.manifest import SEQUENCES


@dataclass(frozen=True, kw_only=True)
class KnnProbe:
    """Classification by the nearest training scans, without training."""

    neighbours: tuple[int, ...] = (1, 3, 5, 10, 20, 50)
    """The neighbourhood sizes k (paper sec. 4.6)."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is predicted from which scans, how, and how well that went is measured."""

    name: str
    """Word on the command line and folder of the results."""
    inputs: tuple[str, ...]
    """Sequences that are used; each scan is one case."""
    target: str
    """``sequence`` for the scan's own, otherwise a column of the label tables."""
    classes: tuple[str, ...] = ()
    """Values of a categorical target, in the order of the outputs; empty for a number."""
    unit: str = ""
    """Unit of a numerical target."""
    target_range: tuple[float, float] | None = None
    """Values of a numerical target outside this range are refused: they are in another unit, or wrong."""
    head: MlpHead | KnnProbe
    """What stands on the frozen features, with its loss, optimiser and length of training."""
    metrics: tuple[str, ...]
    """Names of ``evaluation.METRICS``, the paper's main metric first."""
    section: str
    """Section of the paper."""


# The paper does not say for how many epochs heads are trained (its release: 8 epochs of batches of 4, best epoch by the
# test set). A fixed number of epochs would leave small cohorts and small label ratios untrained at a learning rate of
# 1e-4, so the rows fix the number of steps instead: 1,000 of 32 scans, which is 22 epochs of the paper's largest
# brain-age training set (1,440 scans) and brings the training loss of the simulated cohorts to the floor.
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="sequence",
                inputs=SEQUENCES,
                target="sequence",
                classes=SEQUENCES,
                head=MlpHead(loss="cross_entropy"),
                metrics=("accuracy", "macro_auc"),
                section="4.3.6",
            ),
            Task(
                name="brain_age",
                inputs=("T1",),
                target="age",
                unit="years",
                target_range=(0.0, 120.0),
                head=MlpHead(loss="squared_error"),
                metrics=("mae",),
                section="4.3.3",
            ),
            Task(
                name="knn_sequence",
                inputs=SEQUENCES,
                target="sequence",
                classes=SEQUENCES,
                head=KnnProbe(),
                metrics=("accuracy",),
                section="4.6",
            ),
        )
    }
)
