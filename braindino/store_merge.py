"""``braindino merge``: one slice store out of several, without copying where the disk allows links."""

import filecmp
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from braindino.atomic import sync
from braindino.command_line import GOES_ON, command_line
from braindino.lock import lock_folder
from braindino.progress import track
from braindino.slice_store import SliceStore, SliceStoreWriter, scan_files
from braindino.store_verify import store_folder

EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Put the scans of several slice stores into one, the same as if they had been prepared together.

    Scans are hard-linked where the disk allows it, copied otherwise. Run it again after an interruption. The stores
    must have been made in the same way; a scan that two of them hold must be the same in both.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the new store."""
    stores: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE...")]
    """Slice stores, or folders made by `braindino prepare`."""

    def __post_init__(self) -> None:
        if not self.stores:
            raise ValueError("STORE: none given; expected the stores to merge")


class Pick(NamedTuple):
    """One scan of a store: its row there."""

    store: SliceStore
    row: int

    @property
    def scan_id(self) -> str:
        return self.store.scan_ids[self.row]

    @property
    def path(self) -> Path:
        """The file of its slices."""
        return self.store.scan_path(self.row)


@command_line("merge", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the store was made, 1 on an error."""
    options = tyro.cli(MergeOptions, args=argv, prog="braindino merge")
    stores = [SliceStore(store_folder(folder)) for folder in options.stores]
    check_contracts(stores)
    merged = assemble(options.out, union(stores), contract=stores[0].contract)
    repeats = sum(store.num_scans for store in stores) - merged.num_scans
    again = f", {repeats} held by more than one" if repeats else ""
    print(f"{options.out}: {merged.num_scans} scans, {len(merged)} slices of {len(stores)} store(s){again}")
    return 0


def check_contracts(stores: Sequence[SliceStore]) -> None:
    """
    Raises:
        ValueError: two stores were made in different ways; names what differs.
    """
    first = stores[0]
    for store in stores[1:]:
        differing = [
            f"{key}: {_shown(first.contract, key)} in {first.store_dir}, {_shown(store.contract, key)} in "
            f"{store.store_dir}"
            for key in sorted(first.contract.keys() | store.contract.keys())
            if _shown(first.contract, key) != _shown(store.contract, key)
        ]
        if differing:
            raise ValueError(
                f"stores made in different ways cannot be one; {'; '.join(differing)}; prepare one of them again"
            )


def union(stores: Sequence[SliceStore]) -> list[Pick]:
    """Every scan of the stores once.

    Raises:
        ValueError: two stores hold different slices, or different rows, of the same scan; names both.
    """
    picks: dict[str, Pick] = {}
    conflicts = []
    for store in stores:
        for row, scan_id in enumerate(store.scan_ids):
            pick = Pick(store, row)
            held = picks.setdefault(scan_id, pick)
            if held is not pick and not _same(held.path, pick.path):
                conflicts.append(_conflict(held, pick))
    if conflicts:
        more = f"\n  and {len(conflicts) - EXAMPLES} more" if len(conflicts) > EXAMPLES else ""
        raise ValueError(
            f"{len(conflicts)} scan(s) differ between stores; leave them out of one (`braindino subset "
            "--exclude-subjects`) or prepare them again:\n  " + "\n  ".join(conflicts[:EXAMPLES]) + more
        )
    return list(picks.values())


def assemble(out: Path, picks: Sequence[Pick], *, contract: dict) -> SliceStore:
    """Publish a store of exactly the picked scans in ``out``: the bytes are those of a store that was made of them.

    Raises:
        ValueError: ``out`` is one of the stores, holds other scans, or somebody else is at work there.
        StoreError: a scan's file is not the one its store has indexed.
    """
    for store in {id(pick.store): pick.store for pick in picks}.values():
        if out.exists() and out.samefile(store.store_dir):
            raise ValueError(f"{out}: is one of the stores to read; choose another folder for the result")
    with lock_folder(out):
        writer = SliceStoreWriter(out, contract=contract)
        for left in (out / "slices").rglob(".tmp-*"):
            left.unlink()
        others = {path.name for path, _ in scan_files(out)} - {pick.scan_id for pick in picks}
        if others:
            raise ValueError(
                f"{out}: holds {len(others)} scan(s) that the result does not have (first: {min(others)}); "
                "choose an empty folder"
            )
        folders = set()
        for pick in track(picks, desc="link"):
            writer.adopt(pick.path, header_crc32=int(pick.store.header_crc32[pick.row]))
            folders.add(writer.scan_file(pick.scan_id).parent)
        for folder in folders:
            sync(folder)
        return writer.publish()


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _conflict(held: Pick, pick: Pick) -> str:
    one, other = (asdict(each.store.scans[each.row]) for each in (held, pick))
    fields = [name for name in one if one[name] != other[name]]
    where = f"{one['path']} in {held.store.store_dir}, {other['path']} in {pick.store.store_dir}"
    # Positions, lengths and checksums; where slices begin in a file depends on the length of its scan's row.
    mine, theirs = (each.store.records_of_scan(each.row)[:, [0, 1, 3]] for each in (held, pick))
    same_slices = np.array_equal(mine, theirs)
    what = f"same slices, but different {', '.join(fields)}" if same_slices and fields else "different slices"
    return f"{where}: {what}"


def _shown(contract: dict, key: str) -> str:
    return json.dumps(contract[key], sort_keys=True, ensure_ascii=False) if key in contract else "nothing"


if __name__ == "__main__":
    raise SystemExit(main())
