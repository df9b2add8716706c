"""Signs of collapse in the rows of a run's metrics: what is wrong, for how long, and what to do.

A sign counts when every logged row of the last ``PATIENCE`` iterations shows it, so that the first steps, in which an
untrained encoder tells slices hardly apart, raise nothing.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Constant images show it within 50 steps at the usual 10 between rows.
PATIENCE = 35
# Spread of the teacher's features of different slices. Measured with the debug recipe over 50 steps: 4e-5 at the start
# and growing on simulated slices, at most 4e-7 (rounding) where all slices are alike.
MIN_TEACHER_STD = 1e-6
# Effective dimensions of a batch's features; runs in order have several.
MIN_FEATURE_RANK = 1.05
# Mean distance to the nearest other feature over what their spread lets expect: 0.3 to 0.5 in a demo run, 0 where all
# slices of a batch fall on a few points.
MIN_NEIGHBOUR_DISTANCE = 0.01
# Entropy of each of the teacher's distributions over ln K: 1 when it prefers nothing, and then teaches nothing. An
# untrained teacher at the paper's temperature is at 0.99.
MAX_TEACHER_ENTROPY = 1 - 1e-5
# Entropy of the mean of the teacher's distributions over ln K, as when nearly all slices go to a few prototypes.
MIN_PROTOTYPE_USE = 0.05


class Alarm(NamedTuple):
    """Something that a run should not show.

    Attributes:
        kind: ``same_features``, ``one_direction``, ``few_points``, ``few_prototypes`` or ``uniform_teacher``.
        message: what, found, expected, and what to do.
    """

    kind: str
    message: str


class CollapseAlarms:
    """Looks at the rows of a run as they come; each kind is told once until it has recovered."""

    def __init__(self, num_prototypes: int, *, before: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
            num_prototypes: K of the DINO head.
            before: rows of the run up to where it is resumed.
        """
        self._log_k = math.log(num_prototypes)
        self._since: dict[str, int] = {}
        self._told: set[str] = set()
        for row in before:
            self.check(row)

    def check(self, row: Mapping[str, Any]) -> list[Alarm]:
        """The alarms that are new with this row of ``metrics.jsonl``."""
        iteration = int(row["iteration"])
        new = []
        for alarm in self._signs(row):
            first = self._since.setdefault(alarm.kind, iteration)
            if iteration - first >= PATIENCE and alarm.kind not in self._told:
                self._told.add(alarm.kind)
                new.append(alarm._replace(message=f"iteration {iteration}: {alarm.message} (since {first})"))
        shown = {alarm.kind for alarm in self._signs(row)}
        for kind in [kind for kind in self._since if kind not in shown]:
            del self._since[kind]
            self._told.discard(kind)
        return new

    def _signs(self, row: Mapping[str, Any]) -> list[Alarm]:
        std, rank = row["teacher_std"], row["feature_rank"]
        use, entropy = (row[name] / self._log_k for name in ("prototype_entropy", "teacher_entropy"))
        signs = []
        if std < MIN_TEACHER_STD:
            signs.append(
                Alarm(
                    "same_features",
                    f"all slices of a batch have the same features: spread {std:.1e}, expected over "
                    f"{MIN_TEACHER_STD:g}; are the slices of the store all alike? Look at the montages",
                )
            )
        elif rank < MIN_FEATURE_RANK:
            signs.append(
                Alarm(
                    "one_direction",
                    f"features differ along one direction only: effective rank {rank:.2f}, expected over "
                    f"{MIN_FEATURE_RANK:g}; raise loss.koleo_weight, or lower the learning rate and start anew",
                )
            )
        elif row["neighbour_distance"] < MIN_NEIGHBOUR_DISTANCE:
            signs.append(
                Alarm(
                    "few_points",
                    f"features fall on few points: the nearest other lies at {row['neighbour_distance']:.1e} of the "
                    f"distance expected, at least {MIN_NEIGHBOUR_DISTANCE:g} was; are scans in the store several times "
                    "over? If not, raise loss.koleo_weight",
                )
            )
        # Of equal features a centred teacher makes the uniform distribution: that has its alarm.
        if entropy > MAX_TEACHER_ENTROPY and std >= MIN_TEACHER_STD:
            signs.append(
                Alarm(
                    "uniform_teacher",
                    f"the teacher prefers no prototype: entropy {entropy:.6f} of ln K, expected below "
                    f"{MAX_TEACHER_ENTROPY:g}; lower its temperature",
                )
            )
        if use < MIN_PROTOTYPE_USE:
            signs.append(
                Alarm(
                    "few_prototypes",
                    f"the teacher uses hardly any prototypes: entropy {use:.3f} of ln K, expected over "
                    f"{MIN_PROTOTYPE_USE:g}; raise the teacher's temperature, or take sinkhorn_knopp centring",
                )
            )
        return signs
