"""Frozen features on disk: what one encoder says of many scans. Owner of the format (version 2).

A table is a folder, usually ``features/<encoder name>/``::

    features.json               format, key, identity of the encoder (weights, preparation, reading), precision, sizes
    scans.tsv                   one row per scan, as in a prepared folder, sorted
    scans/<scan_id>.safetensors float32: global (D,), early, mid and late (D' each), and of an encoder of slices
                                cls (S, D) and patches (S, D), from the lowest slice to the highest
    pretrained_on.tsv           what the encoder was pretrained on (``braindino.leakage``); missing where nobody knows

The features are not rounded to half precision: between the scans of one cohort, CLS tokens of an encoder that has
hardly been trained differ in the fourth digit and later, and a comparison with such an encoder must not be decided
by rounding.

One table holds one encoder, one preparation and one precision; the cache cannot mix two. Each scan's file appears
whole, carries the key of its table and checksums of its arrays, and is read in part: the global features of a thousand
scans touch none of their slices. What can be chosen later (the pool, the range of slices, the layer, the fusion of a
subject's scans) is chosen when reading, so that another choice needs no second pass through the encoder.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from braindino.atomic import plain, replace_file, write_json
from braindino.encoders.contract import Features, Identity
from braindino.manifest import Scan, read_scans, write_scans

FORMAT = "braindino feature table"
FORMAT_VERSION = 2
SECONDS_BETWEEN_TABLES = 30.0
WHOLE = (0.0, 1.0)
"""The range of all slices."""

Pool = Literal["global", "cls", "patches"]
SlicePool = Literal["cls", "patches"]
Depth = Literal["early", "mid", "late"]
DEPTHS: tuple[Depth, ...] = ("early", "mid", "late")
Value = TypeVar("Value")


@dataclass(frozen=True)
class FeatureTableMeta:
    """Where the features of a table come from.

    Attributes:
        identity: of the encoder: weights, preparation, reading.
        precision: ``float32`` or ``bfloat16``: what the encoder computed in. What it made is kept in float32.
        dim: D, length of the global feature.
        num_slices: S, of each scan; None for an encoder of volumes.
    """

    identity: Identity
    precision: str
    dim: int
    num_slices: int | None

    @property
    def key(self) -> str:
        """64 hexadecimal digits that change with the encoder's identity and with the precision."""
        return hashlib.sha256(f"{self.identity.key} {self.precision}".encode()).hexdigest()


class FeatureTableWriter:
    """Adds scans to a table; used as a context manager, or closed by hand, so that the last rows reach
    ``scans.tsv``.
    """

    def __init__(self, table_dir: str | Path, meta: FeatureTableMeta) -> None:
        """Start a table in ``table_dir``, or go on with the one that is there.

        Raises:
            ValueError: the folder holds features of another encoder, preparation, reading or precision, or features of
                which nobody knows whose they are.
        """
        self.table_dir = Path(table_dir)
        self.meta = meta
        self._scans: dict[str, Scan] = {}
        path = self.table_dir / "features.json"
        if not path.exists():
            if next((self.table_dir / "scans").glob("[!.]*.safetensors"), None) is not None:
                raise ValueError(
                    f"{self.table_dir}: holds features but no features.json that says whose they are; "
                    "give another folder, or delete this one"
                )
            write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "key": meta.key, **asdict(meta)})
        # Read even where it was just written: of two that start a table at once, one finds the other's.
        _refuse_another_source(self.table_dir, found=_read_meta(self.table_dir), wanted=meta)
        if (self.table_dir / "scans.tsv").exists():
            self._scans = {scan.scan_id: scan for scan in read_scans(self.table_dir / "scans.tsv")}
        self._last_table = time.monotonic()

    def keep(self, scan: Scan, *, newer_than: float = 0.0) -> bool:
        """Whether the features of ``scan`` are here already; the scan is listed in that case.

        Args:
            scan: what is asked for. (A killed run can leave a finished file that the table does not list yet.)
            newer_than: modification time of the scan's own files, seconds since 1970; older features are deleted.
        """
        path = _scan_path(self.table_dir, scan)
        found = path.exists()
        if found and path.stat().st_mtime < newer_than:
            path.unlink()
            found = False
        if found:
            self._scans[scan.scan_id] = scan
        else:
            self._scans.pop(scan.scan_id, None)
        return found

    def add(self, scan: Scan, features: Features) -> None:
        """Write the features of one scan and list it; a scan added before is replaced.

        Raises:
            ValueError: what ``save_features`` says of them.
        """
        save_features(self.table_dir, self.meta, scan, features)
        self.record(scan)

    def record(self, scan: Scan) -> None:
        """List a scan whose file was written with ``save_features``, perhaps by another thread or process."""
        self._scans[scan.scan_id] = scan
        # Rewriting the table at every scan would make a large cohort quadratic.
        if time.monotonic() - self._last_table > SECONDS_BETWEEN_TABLES:
            self.close()

    def close(self) -> None:
        """Write ``scans.tsv``, sorted, so that the same scans give the same bytes in whatever order they came; the
        writer can go on afterwards.
        """
        rows = sorted(self._scans.values(), key=lambda scan: (scan.subject_key, scan.session, scan.path, scan.scan_id))
        write_scans(self.table_dir / "scans.tsv", rows)
        self._last_table = time.monotonic()

    def __enter__(self) -> "FeatureTableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FeatureTable:
    """A table read back.

    Attributes:
        table_dir: its folder.
        meta: encoder, precision and sizes.
        scans: all its scans, by cohort, subject, session and path.
    """

    def __init__(self, table_dir: str | Path) -> None:
        """Open a table.

        Raises:
            ValueError: the folder is no feature table, or one of another version.
        """
        self.table_dir = Path(table_dir)
        self.meta = _read_meta(self.table_dir)
        if not (self.table_dir / "scans.tsv").exists():
            raise ValueError(
                f"{self.table_dir}: no scans.tsv, extraction was stopped before its end or ran in parts; "
                "run extract again, without --part"
            )
        self.scans: list[Scan] = read_scans(self.table_dir / "scans.tsv")

    def __len__(self) -> int:
        return len(self.scans)

    @property
    def identity(self) -> Identity:
        """Of the encoder."""
        return self.meta.identity

    @property
    def dim(self) -> int:
        """D, length of the global feature."""
        return self.meta.dim

    @property
    def has_slices(self) -> bool:
        """Whether there are features of slices: pools ``cls`` and ``patches``."""
        return self.meta.num_slices is not None

    def pooled(
        self, scans: Sequence[Scan], *, pool: Pool = "global", slice_range: tuple[float, float] = WHOLE
    ) -> np.ndarray:
        """(n, D) float32: one feature per scan, in the order asked for.

        Args:
            scans: of this table.
            pool: ``global``: the encoder's feature of the volume, for encoders of slices the mean of all CLS tokens
                (paper sec. 4.3). ``cls``, ``patches``: the mean over slices of their CLS tokens, or of the means of
                their patch tokens.
            slice_range: lowest and highest relative position of the slices that count, both included; slice i of S,
                from the lowest, lies at (i + 0.5) / S.

        Raises:
            ValueError: the encoder has no such pool, no slice lies in the range, a scan is not in the table, or its
                file is damaged.
        """
        if pool == "global":
            if tuple(slice_range) != WHOLE:
                raise ValueError(
                    f"{self.table_dir}: pool 'global' is of the whole volume, found slice_range {slice_range}; "
                    f"{self._pools()}"
                )
            return self._stack(scans, lambda scan: self._read(scan, "global"))
        rows = self._rows(pool, slice_range)
        return self._stack(scans, lambda scan: self._read(scan, pool)[rows].mean(axis=0, dtype=np.float64))

    def slices(
        self, scans: Sequence[Scan], *, pool: SlicePool = "cls", slice_range: tuple[float, float] = WHOLE
    ) -> np.ndarray:
        """(n, S', D) float32: the features of the slices in the range, from the lowest to the highest; arguments and
        errors as for ``pooled``.
        """
        rows = self._rows(pool, slice_range)
        return self._stack(scans, lambda scan: self._read(scan, pool)[rows])

    def layer(self, scans: Sequence[Scan], depth: Depth) -> np.ndarray:
        """(n, D') float32: the volume's feature at ``early``, ``mid`` or ``late`` depth (paper sec. 4.6).

        Raises:
            ValueError: no such depth, a scan is not in the table, or its file is damaged.
        """
        if depth not in DEPTHS:
            raise ValueError(f"depth: found {depth!r}; expected one of {', '.join(DEPTHS)}")
        return self._stack(scans, lambda scan: self._read(scan, depth))

    def _stack(self, scans: Sequence[Scan], read: Callable[[Scan], np.ndarray]) -> np.ndarray:
        if not scans:
            raise ValueError(f"{self.table_dir}: features of no scan were asked for; expected at least one")
        first = np.asarray(read(scans[0]))
        # Filled one by one: all slices of a thousand scans are there once, not twice.
        features = np.empty((len(scans), *first.shape), dtype=np.float32)
        features[0] = first
        for row, scan in enumerate(scans[1:], start=1):
            found = read(scan)
            if found.shape != first.shape:
                raise self._damaged(scan, f"found shape {found.shape}; the scans before it have {first.shape}")
            features[row] = found
        return features

    def _rows(self, pool: str, slice_range: tuple[float, float]) -> slice:
        """Which slices lie in the range."""
        num_slices = self.meta.num_slices
        if num_slices is None or pool not in ("cls", "patches"):
            raise ValueError(f"{self.table_dir}: no pool {pool!r} of slices; {self._pools()}")
        return slices_within(slice_range, num_slices)

    def _pools(self) -> str:
        pools = "global, cls and patches" if self.has_slices else "only global, being of whole volumes"
        return f"encoder {self.identity.name} has the pools {pools}"

    def _read(self, scan: Scan, name: str) -> np.ndarray:
        """One array of one scan; nothing else of its file is read."""
        path = _scan_path(self.table_dir, scan)
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})["braindino"])
                if facts["key"] != self.meta.key:
                    raise ValueError(
                        f"{path}: made by another encoder, preparation or precision than this table; "
                        "delete the file and run extract again"
                    )
                array = file.get_tensor(name)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no features of {scan.path} in this table; run extract again") from error
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise self._damaged(scan, f"{type(error).__name__}: {error}") from error
        if zlib.crc32(array.tobytes()) != facts["crc32"].get(name):
            raise self._damaged(scan, f"the checksum of {name!r} does not fit")
        return array

    def _damaged(self, scan: Scan, problem: str) -> ValueError:
        path = _scan_path(self.table_dir, scan)
        return ValueError(f"{path}: damaged features of {scan.path} ({problem}); delete the file and run extract again")


def slices_within(slice_range: tuple[float, float], num_slices: int) -> slice:
    """Which of ``num_slices`` slices lie in the range; see ``FeatureTable.pooled``.

    Raises:
        ValueError: none does, or the range is none.
    """
    low, high = slice_range
    if not 0 <= low < high <= 1:
        raise ValueError(f"slice_range: found {slice_range}; expected two rising numbers from 0 (lowest) to 1")
    positions = (np.arange(num_slices) + 0.5) / num_slices
    inside = np.flatnonzero((positions >= low) & (positions <= high))
    if not inside.size:
        raise ValueError(f"slice_range: no middle of {num_slices} slices lies in {slice_range}; give a wider range")
    return slice(int(inside[0]), int(inside[-1]) + 1)


def save_features(table_dir: Path, meta: FeatureTableMeta, scan: Scan, features: Features) -> None:
    """Write the file of one scan; for any thread or process, as long as no two write the same scan.

    Raises:
        ValueError: shapes that are not those of the table, or values that are not finite; nothing is written.
    """
    arrays = {"global": features.global_, **features.layers._asdict()}
    if features.slices is not None:
        arrays |= {"cls": features.slices.cls, "patches": features.slices.patches}
    content = {name: np.ascontiguousarray(array.numpy(), dtype=np.float32) for name, array in arrays.items()}
    expected: dict[str, tuple[int, ...]] = {"global": (meta.dim,)}
    if meta.num_slices is not None:
        # Patch tokens need not be as wide as the feature: some networks project when they pool.
        width = content["patches"].shape[-1] if "patches" in content else meta.dim
        expected |= {"cls": (meta.num_slices, meta.dim), "patches": (meta.num_slices, width)}
    found = {name: array.shape for name, array in content.items() if name not in DEPTHS}
    if found != expected or any(content[name].ndim != 1 or not content[name].size for name in DEPTHS):
        shapes = {name: array.shape for name, array in content.items()}
        raise ValueError(f"features of {scan.path}: found shapes {shapes}; expected {expected} and a vector per depth")
    bad = {name: int((~np.isfinite(array)).sum()) for name, array in content.items()}
    if any(bad.values()):
        where = ", ".join(f"{name} {count}" for name, count in bad.items() if count)
        raise ValueError(
            f"features of {scan.path}: values are not finite: {where}. "
            "Look at the scan, or at the encoder if all scans end like this"
        )
    # One entry: the order of several in a header of this format is left to chance.
    facts = {"key": meta.key, "crc32": {name: zlib.crc32(array.tobytes()) for name, array in content.items()}}
    with replace_file(_scan_path(table_dir, scan)) as temporary:
        save_file(content, temporary, metadata={"braindino": json.dumps(facts, sort_keys=True)})


def remove_leftovers(table_dir: Path) -> None:
    """Delete the temporary files of killed runs; only for who holds the lock of the whole folder."""
    for path in (table_dir / "scans").glob(".tmp-*"):
        path.unlink()


def _scan_path(table_dir: Path, scan: Scan) -> Path:
    return table_dir / "scans" / f"{scan.scan_id}.safetensors"


def _read_meta(table_dir: Path) -> FeatureTableMeta:
    path = table_dir / "features.json"
    if not path.exists():
        raise ValueError(f"{table_dir}: no features.json here; expected a folder made by extract")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged ({error}); delete {table_dir} and extract again") from error
    if content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found {content.get('format')!r} version {content.get('version')!r}; "
            f"expected {FORMAT!r} version {FORMAT_VERSION}; extract again, with this version of braindino, into an "
            "empty folder"
        )
    meta = FeatureTableMeta(
        Identity(**content["identity"]), content["precision"], content["dim"], content["num_slices"]
    )
    if meta.key != content["key"]:
        raise ValueError(f"{path}: its key is not that of its identity and precision: it was edited; extract again")
    return meta


def _refuse_another_source(table_dir: Path, *, found: FeatureTableMeta, wanted: FeatureTableMeta) -> None:
    ours, theirs = found.identity, wanted.identity
    if ours.sha256 != theirs.sha256:
        raise ValueError(
            f"{table_dir}: holds features of encoder {ours.name!r} (weights {ours.sha256[:12]}), "
            f"asked for {theirs.name!r} (weights {theirs.sha256[:12]}); "
            "give each encoder a folder of its own, or delete this one"
        )
    for word, kept, asked in (
        ("prepared as", plain(ours.preparation), plain(theirs.preparation)),
        ("read as", plain(ours.reading), plain(theirs.reading)),
        ("computed in", found.precision, wanted.precision),
    ):
        if kept != asked:
            raise ValueError(
                f"{table_dir}: holds features {word} {kept}, asked for {asked}; "
                "give each a folder of its own, or delete this one"
            )
