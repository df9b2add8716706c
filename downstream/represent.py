"""``python downstream/represent.py --features DIR DIR... --out DIR``: how encoders describe the same scans, from their
features (paper sec. 4.6). Format version 1::

OUT/cka.tsv, spread.tsv, cohort_share.tsv, neighbours.tsv   see braindino.representation_tables
    scans.tsv     the scans that are compared
    run.json      settings, encoders, hashes, versions, command
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import tyro

from braindino.atomic import plain, write_json
from braindino.command_line import command_line
from braindino.downstream.config import RepresentConfig
from braindino.downstream.feature_folders import common_scans, open_tables
from braindino.downstream.representation import (
    GLOBAL,
    choose_scans,
    cka_rows,
    cohort_share_rows,
    group_rows,
    neighbour_rows,
    parse_queries,
    read_features,
    spread_rows,
)
from braindino.downstream.results import data_note, hash_features
from braindino.feature_table import FeatureTable
from braindino.manifest import Scan, write_scans
from braindino.progress import track
from braindino.provenance import code_commit, versions
from braindino.records import read_json
from braindino.representation_tables import (
    CKA_FILE,
    COHORT_SHARE_FILE,
    NEIGHBOURS_FILE,
    SPREAD_FILE,
    CkaRow,
    CohortShareRow,
    NeighbourRow,
    SpreadRow,
    write_cka,
    write_cohort_share,
    write_neighbours,
    write_spread,
)
from braindino.slice_neighbours import SliceIndex

FORMAT_VERSION = 1
TABLES = (CKA_FILE, SPREAD_FILE, COHORT_SHARE_FILE, NEIGHBOURS_FILE)


@command_line("represent")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the tables are written, 1 on an error."""
    config = tyro.cli(RepresentConfig, args=argv, prog="braindino represent")
    _run(config, command=["braindino", "represent", *(sys.argv[1:] if argv is None else argv)])
    return 0


def _run(config: RepresentConfig, *, command: list[str]) -> None:
    tables = open_tables(config.features)
    scans = choose_scans(
        common_scans(tables, verb="represent"), sequences=config.sequences, per_cohort=config.per_cohort
    )
    groups, small = group_rows(scans)
    counts = [table.meta.num_slices for table in tables.values() if table.meta.num_slices is not None]
    queries = parse_queries(config.queries, scans, num_slices=min(counts, default=0))
    _introduce(scans, small)
    features = {name: read_features(table, scans) for name, table in tables.items()}
    _write_run(config, tables, scans, features, queries=[asdict(query) for query in queries], command=command)

    num_units = sum(2 if len({scans[row].subject_key for row in rows}) < len(rows) else 1 for rows in groups.values())
    num_rows = 3 * num_units * len(tables) * (len(tables) - 1) // 2
    alignments = list(track(cka_rows(features, scans, groups), total=num_rows, desc="cka"))
    spreads = list(spread_rows(features, scans, groups))
    shares = list(cohort_share_rows(features, scans, k=config.neighbours))
    neighbours: list[NeighbourRow] = []
    for name, table in tables.items():
        whole = [query for query in queries if query.place is None]
        slices = [query for query in queries if query.place is not None]
        index = SliceIndex(scans, features[name][GLOBAL][:, None])
        neighbours += neighbour_rows(name, index, whole, count=config.neighbours, whole=True)
        if slices and not table.has_slices:
            print(f"represent: {name} reads whole volumes, so {len(slices)} queries of slices are left out for it")
        elif slices:
            index = SliceIndex.from_table(table, scans)
            neighbours += neighbour_rows(name, index, slices, count=config.neighbours, whole=False)

    write_spread(config.out / SPREAD_FILE, spreads)
    write_cohort_share(config.out / COHORT_SHARE_FILE, shares)
    write_neighbours(config.out / NEIGHBOURS_FILE, neighbours)
    # Last: a folder with alignments has everything.
    write_cka(config.out / CKA_FILE, alignments)
    print("", _format(alignments, spreads, shares), "", config.out, sep="\n")


def _introduce(scans: Sequence[Scan], small: Mapping[str, int]) -> None:
    note = data_note(scans)
    print(
        f"represent: {len(scans)} scans of {len({scan.subject_key for scan in scans})} subjects, cohorts "
        f"{', '.join(sorted({scan.cohort for scan in scans}))}{'; ' + note if note else ''}"
    )
    for cohort, count in small.items():
        print(f"no group of its own: {cohort}, {count} subject(s); 4 are needed")


def _write_run(
    config: RepresentConfig,
    tables: Mapping[str, FeatureTable],
    scans: Sequence[Scan],
    features: Mapping[str, Mapping[str, np.ndarray]],
    *,
    queries: Sequence[Mapping[str, Any]],
    command: list[str],
) -> None:
    """Write what is needed to repeat the analysis, before it begins.

    Raises:
        ValueError: the folder holds results of other settings, and they are not to be replaced.
    """
    decisive = plain(
        {
            "settings": {
                "sequences": config.sequences,
                "per_cohort": config.per_cohort,
                "neighbours": config.neighbours,
                "queries": [[query["scan"]["path"], query["place"]] for query in queries],
            },
            "encoders": {
                name: {
                    "features_dir": str(table.table_dir.resolve()),
                    "identity": asdict(table.identity),
                    "precision": table.meta.precision,
                    "features_sha256": {depth: hash_features(values) for depth, values in features[name].items()},
                }
                for name, table in tables.items()
            },
            "scans_sha256": hashlib.sha256("\n".join(scan.scan_id for scan in scans).encode()).hexdigest(),
        }
    )
    path = config.out / "run.json"
    if path.exists():
        before = read_json(path)
        changed = [key for key, value in decisive.items() if before.get(key) != value]
        if changed and not config.replace:
            raise ValueError(
                f"{config.out}: holds results of other {', '.join(changed)}; choose another --out, or give --replace "
                "to lose them"
            )
        if changed:
            # Stopped from here on, the folder must not show the old numbers as those of the new settings.
            for name in TABLES:
                (config.out / name).unlink(missing_ok=True)
    write_scans(config.out / "scans.tsv", list(scans))
    write_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            **decisive,
            "data": data_note(scans),
            "num_scans": len(scans),
            "provenance": {"command": command, "versions": versions(), "code_commit": code_commit()},
        },
    )


def _format(alignments: Sequence[CkaRow], spreads: Sequence[SpreadRow], shares: Sequence[CohortShareRow]) -> str:
    """The main numbers for a terminal."""
    lines = [
        f"CKA {row.group}, {row.unit}s ({row.n}), {row.depth}: {row.encoder_a} - {row.encoder_b} "
        f"{row.cka:.3f} [{row.low:.3f}, {row.high:.3f}], debiased {row.debiased:.3f} "
        f"[{row.debiased_low:.3f}, {row.debiased_high:.3f}]"
        for row in alignments
    ]
    lines += [
        f"spread {row.group}, {row.encoder}: effective rank {row.effective_rank:.1f} of {min(row.n - 1, row.dim)}, "
        f"participation ratio {row.participation_ratio:.1f}, mean cosine {row.mean_cosine:.3f}, "
        f"first component {row.first_share:.2f}, between / within subjects {row.between_within:.2f}"
        for row in spreads
        if row.depth == GLOBAL
    ]
    lines += [
        f"nearest {row.k} of the same cohort, {row.encoder}, cohort {row.cohort}, among {row.bank}: {row.share:.2f} "
        f"[{row.low:.2f}, {row.high:.2f}], chance {row.chance:.2f}"
        for row in shares
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
