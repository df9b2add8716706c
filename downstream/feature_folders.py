"""The feature tables that a command line names, one per encoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from braindino.feature_table import FeatureTable
from braindino.manifest import Scan


def open_tables(folders: Sequence[Path]) -> dict[str, FeatureTable]:
    """Encoder name -> table; an encoder is called by the name of its feature folder.

    Raises:
        ValueError: two folders of one name, or what ``FeatureTable`` says of one.
    """
    names = [path.resolve().name for path in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"--features: found folders called {names}; expected one or more, each with a name of its own")
    return {name: FeatureTable(path) for name, path in zip(names, folders, strict=True)}


def common_scans(tables: Mapping[str, FeatureTable], *, verb: str) -> list[Scan]:
    """The scans that all encoders have, in the order of the first: they are compared on the same cases."""
    first = next(iter(tables.values()))
    common = set.intersection(*({scan.scan_id for scan in table.scans} for table in tables.values()))
    for name, table in tables.items():
        if len(table) > len(common):
            print(f"{verb}: {len(table) - len(common)} scans of {name} are left out: not all encoders have them")
    return [scan for scan in first.scans if scan.scan_id in common]
