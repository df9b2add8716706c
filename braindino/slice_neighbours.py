"""What else looks like this to the encoder: the slices of a feature table nearest to a feature.

Cosine similarity over all slices, without an approximate index. The features of a table are read once and stay in
memory: 393 MB for 1,000 scans of 128 slices and 768 numbers. One question then is one pass over them, limited by the
speed of memory: less than a tenth of a second for such a table, and about one second where slices differ so little, as
those of an untrained encoder, that all of them must be compared in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from braindino.feature_table import FeatureTable, SlicePool
from braindino.manifest import Scan

ROWS_AT_A_TIME = 4096


class Neighbour(NamedTuple):
    """A slice found by ``SliceIndex.nearest``."""

    scan: Scan
    place: int
    """Which of the scan's S slices in the table, from the lowest."""
    similarity: float
    """Cosine with what was asked for, -1 to 1."""


class SliceIndex:
    """The slices of many scans, to be asked for those most like a feature.

    Attributes:
        scans: whose slices they are.
        num_slices: S, slices of each scan.
        dim: D, length of a feature.
    """

    def __init__(self, scans: Sequence[Scan], features: np.ndarray) -> None:
        """Keeps ``features`` (n, S, D) float32 of the n ``scans``, and does not copy them.

        Raises:
            ValueError: not one block of features for each scan.
        """
        if features.ndim != 3 or len(features) != len(scans) or not features.size:
            raise ValueError(
                f"slice index: found features of shape {features.shape} for {len(scans)} scans; "
                "expected (scans, slices, D), none of them 0"
            )
        self.scans = list(scans)
        self.num_slices, self.dim = features.shape[1:]
        self._rows = features.reshape(-1, self.dim)
        self._norms = np.concatenate(
            [
                np.linalg.norm(self._rows[start : start + ROWS_AT_A_TIME].astype(np.float64), axis=1)
                for start in range(0, len(self._rows), ROWS_AT_A_TIME)
            ]
        )
        keys = {key: number for number, key in enumerate(sorted({scan.subject_key for scan in scans}))}
        self._subjects = np.repeat([keys[scan.subject_key] for scan in scans], self.num_slices)

    @classmethod
    def from_table(
        cls, table: FeatureTable, scans: Sequence[Scan] | None = None, *, pool: SlicePool = "cls"
    ) -> "SliceIndex":
        """The slices of a feature table.

        Args:
            table: of an encoder of slices.
            scans: of the table; None for all.
            pool: ``cls``: the slices' CLS tokens. ``patches``: the means of their patch tokens.

        Raises:
            ValueError: the table is of an encoder of volumes, or a file of it is missing or damaged.
        """
        if not table.has_slices:
            raise ValueError(
                f"{table.table_dir}: encoder {table.identity.name} reads whole volumes, so this table has no slices to "
                "look among; give the features of an encoder of slices"
            )
        scans = table.scans if scans is None else scans
        return cls(scans, table.slices(scans, pool=pool))

    def feature(self, scan: Scan, place: int) -> np.ndarray:
        """(D,) float32, of slice ``place`` of ``scan``.

        Raises:
            ValueError: no such scan, or no such slice.
        """
        numbers = [number for number, each in enumerate(self.scans) if each.scan_id == scan.scan_id]
        if not numbers or not 0 <= place < self.num_slices:
            raise ValueError(
                f"slice index: no slice {place} of {scan.path}; it holds {len(self.scans)} scans with slices 0 to "
                f"{self.num_slices - 1}"
            )
        return self._rows[numbers[0] * self.num_slices + place]

    def nearest(
        self,
        feature: np.ndarray,
        *,
        count: int,
        but_subject: str | None = None,
        one_per_subject: bool = True,
        but_cohort: str | None = None,
    ) -> list[Neighbour]:
        """The ``count`` slices most like ``feature``, most similar first; fewer where there are no more.

        Similarities are computed in float64; of equally similar slices the one of the earlier scan, then the lower one,
        comes first, whatever the machine. A slice whose feature is 0 has no direction: its similarity is 0.

        Args:
            feature: (D,).
            count: how many.
            but_subject: ``Scan.subject_key`` of a subject to leave out, such as the one asked about.
            one_per_subject: only the most similar slice of each subject; otherwise the neighbours of a slice are mostly
                the slices beside it.
            but_cohort: a cohort to leave out.

        Raises:
            ValueError: a feature of another length, not finite or 0, or ``count`` below 1.
        """
        feature = np.asarray(feature, dtype=np.float64)
        length = float(np.linalg.norm(feature)) if feature.shape == (self.dim,) else 0.0
        if not 0 < length < np.inf:
            raise ValueError(
                f"slice index: found a feature of shape {feature.shape} and length {length}; expected {self.dim} "
                "finite numbers that are not all 0: is it a feature of the same encoder?"
            )
        if count < 1:
            raise ValueError(f"slice index: {count} neighbours were asked for; expected 1 or more")
        unit = feature / length
        norms = np.where(self._norms > 0, self._norms, 1)
        # float32 finds who may be among the nearest, float64 decides: the worst error of a product of D numbers is
        # D units in the last place, and a product of many rows may round equal rows differently.
        rough = (self._rows @ unit.astype(np.float32)) / norms
        doubt = 2 * (self.dim + 2) * float(np.finfo(np.float32).eps)
        rough[~self._allowed(but_subject, but_cohort)] = -np.inf
        if one_per_subject:
            best = np.full(self._subjects.max() + 1, -np.inf)
            np.maximum.at(best, self._subjects, rough)
            bar = np.maximum(_least_of(best, count), best[self._subjects]) - doubt
        else:
            bar = _least_of(rough, count) - doubt
        rows = np.flatnonzero((rough >= bar) & (rough > -np.inf))
        similarity = np.concatenate(
            [
                (self._rows[part].astype(np.float64) * unit).sum(axis=1) / norms[part]
                for part in np.array_split(rows, len(rows) // ROWS_AT_A_TIME + 1)
            ]
        )
        order = np.lexsort((rows, -similarity))
        rows, similarity = rows[order], similarity[order]
        if one_per_subject:
            first = np.sort(np.unique(self._subjects[rows], return_index=True)[1])
            rows, similarity = rows[first], similarity[first]
        return [
            Neighbour(self.scans[row // self.num_slices], int(row % self.num_slices), float(value))
            for row, value in zip(rows[:count], similarity[:count], strict=True)
        ]

    def _allowed(self, but_subject: str | None, but_cohort: str | None) -> np.ndarray:
        allowed = [scan.subject_key != but_subject and scan.cohort != but_cohort for scan in self.scans]
        return np.repeat(allowed, self.num_slices)


def _least_of(values: np.ndarray, count: int) -> float:
    """The ``count``-th largest value, or the smallest where there are fewer."""
    place = max(len(values) - count, 0)
    return float(np.partition(values, place)[place])
