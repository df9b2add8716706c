"""What encoders make of the same scans: alignment, spread, cohort shares and neighbours, as rows of tables (paper sec.
4.6).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from braindino.downstream.cka import MIN_UNITS, combine, gram, gram_products
from braindino.downstream.intervals import bootstrap_interval
from braindino.downstream.metrics import weighted_mean
from braindino.downstream.spread import measure_spread
from braindino.feature_table import DEPTHS, FeatureTable
from braindino.manifest import Scan
from braindino.representation_tables import ALL, AMONG, UNITS, CkaRow, CohortShareRow, NeighbourRow, SpreadRow
from braindino.slice_neighbours import SliceIndex

GLOBAL = "global"
BANKS = (ALL, "same sequence")
MAX_SCANS = 10_000
"""At this number an alignment takes about 5 GB, which grow with its square."""
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Query:
    """A scan, or a slice of it, whose neighbours are asked for.

    Attributes:
        scan: whose.
        place: slice among the table's S, from the lowest; None for the scan as a whole.
    """

    scan: Scan
    place: int | None = None


def choose_scans(scans: Sequence[Scan], *, sequences: Sequence[str], per_cohort: int) -> list[Scan]:
    """The first ``per_cohort`` scans of every cohort (0: all), in the order given: a fixed subset without shuffling
    (paper sec. 4.6).

    Args:
        scans: in the order of a feature table: by cohort, subject, session and path.
        sequences: only these count; empty for any.
        per_cohort: how many at most.

    Raises:
        ValueError: none is left.
    """
    chosen: list[Scan] = []
    counts: dict[str, int] = {}
    for scan in scans:
        if sequences and scan.sequence not in sequences:
            continue
        counts[scan.cohort] = counts.get(scan.cohort, 0) + 1
        if not per_cohort or counts[scan.cohort] <= per_cohort:
            chosen.append(scan)
    if not chosen:
        found = ", ".join(sorted({scan.sequence for scan in scans})) or "none in common"
        raise ValueError(f"no scan of sequence {', '.join(sequences) or 'any'} is in all tables; found {found}")
    return chosen


def group_rows(scans: Sequence[Scan]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The rows of every cohort with at least four subjects, and of all scans together if there are several cohorts; and
    cohort -> subjects of those that have fewer.

    Raises:
        ValueError: no group is large enough, or one is too large.
    """
    cohorts = np.array([scan.cohort for scan in scans])
    groups = {cohort: np.flatnonzero(cohorts == cohort) for cohort in sorted(set(cohorts.tolist()))}
    if ALL in groups:
        raise ValueError(f"a cohort is called {ALL!r}, as all cohorts together are; prepare it under another name")
    sizes = {name: len({scans[row].subject_key for row in rows.tolist()}) for name, rows in groups.items()}
    small = {name: size for name, size in sizes.items() if size < MIN_UNITS}
    if len(groups) > 1:
        groups[ALL] = np.arange(len(scans))
        sizes[ALL] = sum(sizes.values())
    kept = {name: rows for name, rows in groups.items() if sizes[name] >= MIN_UNITS}
    if not kept:
        raise ValueError(
            f"{len(scans)} scans of {max(sizes.values())} subjects; expected {MIN_UNITS} subjects or more of one "
            "cohort, or of all together"
        )
    for name, rows in kept.items():
        if len(rows) > MAX_SCANS:
            raise ValueError(
                f"{len(rows)} scans in group {name}; alignments are made of at most {MAX_SCANS}, whose matrices fill "
                "about 5 GB: give a smaller --per-cohort, or features of fewer cohorts"
            )
    return kept, small


def read_features(table: FeatureTable, scans: Sequence[Scan]) -> dict[str, np.ndarray]:
    """Depth -> (n, D) features of the scans; ``global`` is the one that heads are given."""
    return {**{depth: table.layer(scans, depth) for depth in DEPTHS}, GLOBAL: table.pooled(scans)}


def cka_rows(
    features: Mapping[str, Mapping[str, np.ndarray]], scans: Sequence[Scan], groups: Mapping[str, np.ndarray]
) -> Iterator[CkaRow]:
    """Every two encoders, in the order given, in every group and at every depth: by scan, as in the paper, and by
    subject where subjects have several scans.

    Args:
        features: encoder -> depth -> (n, D).
        scans: the n.
        groups: name -> rows.
    """
    for group, rows in groups.items():
        subjects = np.array([scans[row].subject_key for row in rows])
        for unit in UNITS:
            if unit == "subject" and len(np.unique(subjects)) == len(subjects):
                continue
            for depth in DEPTHS:
                yield from _align_all(features, rows, subjects, group=group, unit=unit, depth=depth)


def spread_rows(
    features: Mapping[str, Mapping[str, np.ndarray]], scans: Sequence[Scan], groups: Mapping[str, np.ndarray]
) -> Iterator[SpreadRow]:
    """How every encoder spreads the scans of every group, at every depth; arguments as for ``cka_rows``."""
    for group, rows in groups.items():
        subjects = [scans[row].subject_key for row in rows]
        for encoder, depths in features.items():
            for depth, values in depths.items():
                yield SpreadRow(
                    group=group,
                    encoder=encoder,
                    depth=depth,
                    n=len(rows),
                    subjects=len(set(subjects)),
                    dim=values.shape[1],
                    **measure_spread(values[rows], subjects)._asdict(),
                )


def cohort_share_rows(
    features: Mapping[str, Mapping[str, np.ndarray]], scans: Sequence[Scan], *, k: int
) -> Iterator[CohortShareRow]:
    """How many of a scan's k nearest scans of other subjects (cosine, global feature) are of its own cohort, beside
    what chance gives: 1 would say that the encoder knows where a scan comes from.

    Scans with fewer than k candidates, or all of whose candidates are of one cohort, are not asked; a bank without any
    that is has no rows. With one sequence both banks are the same, and one of them is told.
    """
    cohorts = np.array([scan.cohort for scan in scans])
    # Numbers are compared faster than names, row by row.
    cohort_of, subject_of, sequence_of = (
        np.unique([getattr(scan, name) for scan in scans], return_inverse=True)[1]
        for name in ("cohort", "subject_key", "sequence")
    )
    for encoder, depths in features.items():
        unit = _unit(depths[GLOBAL])
        for bank in BANKS if sequence_of.any() else (ALL,):
            shares, chances = _own_shares(unit, cohort_of, subject_of, sequence_of if bank != ALL else None, k=k)
            asked = ~np.isnan(shares)
            for cohort in (*sorted(set(cohorts[asked].tolist())), ALL):
                rows = np.flatnonzero(asked & ((cohorts == cohort) | (cohort == ALL)))
                if not rows.size:
                    continue
                interval = bootstrap_interval(partial(weighted_mean, shares[rows]), subject_of[rows])
                yield CohortShareRow(
                    encoder=encoder,
                    bank=bank,
                    cohort=cohort,
                    k=k,
                    n=len(rows),
                    subjects=len(set(subject_of[rows].tolist())),
                    share=interval.estimate,
                    low=interval.low,
                    high=interval.high,
                    chance=float(chances[rows].mean()),
                    method=interval.method,
                )


def neighbour_rows(
    encoder: str, index: SliceIndex, queries: Sequence[Query], *, count: int, whole: bool
) -> Iterator[NeighbourRow]:
    """The ``count`` nearest to every query, one a subject: among all cohorts, and among the others than its own.

    Args:
        encoder: name for the rows.
        index: of scans, one row each, or of slices.
        queries: scans of the index.
        count: how many.
        whole: whether the index is of whole scans.
    """
    for query in queries:
        feature = index.feature(query.scan, 0 if query.place is None else query.place)
        for among in AMONG:
            found = index.nearest(
                feature,
                count=count,
                but_subject=query.scan.subject_key,
                but_cohort=query.scan.cohort if among != AMONG[0] else None,
            )
            for rank, neighbour in enumerate(found, start=1):
                yield NeighbourRow(
                    encoder=encoder,
                    among=among,
                    query=query.scan.scan_id,
                    query_cohort=query.scan.cohort,
                    query_subject=query.scan.subject,
                    query_sequence=query.scan.sequence,
                    query_slice=ALL if query.place is None else str(query.place),
                    rank=rank,
                    scan=neighbour.scan.scan_id,
                    cohort=neighbour.scan.cohort,
                    subject=neighbour.scan.subject,
                    session=neighbour.scan.session,
                    sequence=neighbour.scan.sequence,
                    slice=ALL if whole else str(neighbour.place),
                    similarity=neighbour.similarity,
                    path=neighbour.scan.path,
                )


def parse_queries(texts: Sequence[str], scans: Sequence[Scan], *, num_slices: int) -> list[Query]:
    """``SCAN`` or ``SCAN:SLICE``, SCAN being a scan's id or its path as in ``scans.tsv``; without any text the first
    scan of every cohort, as a whole. ``num_slices``: S of all tables that have slices; 0 where none has.

    Raises:
        ValueError: no such scan, or no such slice.
    """
    if not texts:
        firsts = {scan.cohort: scan for scan in reversed(scans)}
        return [Query(firsts[cohort]) for cohort in sorted(firsts)]
    by_name = {scan.scan_id: scan for scan in scans} | {scan.path: scan for scan in scans}
    queries = []
    for text in texts:
        name, _, place = text.rpartition(":")
        if text in by_name:
            queries.append(Query(by_name[text]))
        elif name in by_name and place.isascii() and place.isdigit():
            queries.append(Query(by_name[name], int(place)))
        else:
            raise ValueError(
                f"--queries: found {text!r}; expected a path of scans.tsv or a scan id (such as {scans[0].scan_id}), "
                "with :SLICE after it for a slice, of a scan that is compared: in all tables, of the --sequences, and "
                "among the --per-cohort"
            )
        asked = queries[-1].place
        if asked is not None and asked >= num_slices:
            has = f"features of slices 0 to {num_slices - 1}" if num_slices else "no features of slices"
            raise ValueError(f"--queries: found {text!r}; the tables have {has}")
    return queries


def _align_all(
    features: Mapping[str, Mapping[str, np.ndarray]],
    rows: np.ndarray,
    subjects: np.ndarray,
    *,
    group: str,
    unit: str,
    depth: str,
) -> Iterator[CkaRow]:
    """Every two encoders on some rows at one depth."""
    of_encoder = {name: depths[depth][rows] for name, depths in features.items()}
    if unit == "subject":
        of_encoder = {name: _mean_by_subject(values, subjects) for name, values in of_encoder.items()}
        subjects = np.unique(subjects)
    own = {name: gram_products(matrix, matrix, subjects) for name, matrix in _grams(of_encoder)}
    for first, second in combinations(of_encoder, 2):
        across = gram_products(gram(of_encoder[first]), gram(of_encoder[second]), subjects)
        found = combine(across, own[first], own[second])
        yield CkaRow(
            group=group,
            unit=unit,
            depth=depth,
            encoder_a=first,
            encoder_b=second,
            n=len(subjects),
            dim_a=of_encoder[first].shape[1],
            dim_b=of_encoder[second].shape[1],
            **found._asdict(),
        )


def _grams(features: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """One Gram matrix after the other: of many encoders they would not fit into memory together."""
    for name, values in features.items():
        yield name, gram(values)


def _mean_by_subject(features: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """(m, D) float64 mean of each subject's rows, subjects sorted."""
    names, subject_of, counts = np.unique(subjects, return_inverse=True, return_counts=True)
    means = np.zeros((len(names), features.shape[1]))
    np.add.at(means, subject_of, features)
    return means / counts[:, None]


def _own_shares(
    unit: np.ndarray, cohorts: np.ndarray, subjects: np.ndarray, sequences: np.ndarray | None, *, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of every scan the share of its own cohort among its k nearest, and among all its candidates; NaN for scans that
    are not asked.
    """
    shares = np.full(len(unit), np.nan)
    chances = np.full(len(unit), np.nan)
    for start in range(0, len(unit), _ROWS_AT_A_TIME):
        for row, similarity in enumerate(unit[start : start + _ROWS_AT_A_TIME] @ unit.T, start=start):
            candidates = subjects != subjects[row]
            if sequences is not None:
                candidates &= sequences == sequences[row]
            own = cohorts == cohorts[row]
            chance = own[candidates].mean() if candidates.any() else 0.0
            if candidates.sum() < k or chance in (0, 1):
                continue
            nearest = np.argsort(np.where(candidates, -similarity, np.inf), kind="stable")[:k]
            shares[row], chances[row] = own[nearest].mean(), chance
    return shares, chances


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)
