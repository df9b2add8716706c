"""Frozen features on disk: one encoder's slice CLS tokens of many scans. Owner of the format (version 1).

A table is a folder, usually ``features/<encoder name>/``::

    features.json         format, encoder name, SHA-256 of its weights, preparation (how the slices were made)
    scans.tsv             one row per scan, as in a prepared folder
    cls/<scan_id>.npy     (num_slices, D) float32, the CLS tokens from the lowest slice to the highest
    pretrained_on.tsv     what the encoder was pretrained on (``braindino.leakage``); missing where nobody knows

The features are not rounded to half precision: between the scans of one cohort, CLS tokens of an encoder that has
hardly been trained differ in the fourth digit and later, and a comparison with such an encoder must not be decided
by rounding.

One table holds one encoder and one preparation; the cache cannot mix two. Each scan's file appears whole. The mean
over slices is taken when reading, so that another way of pooling needs no second pass through the encoder.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from braindino.atomic import replace_file, write_json
from braindino.manifest import Scan, read_scans, write_scans

FORMAT = "braindino feature table"
FORMAT_VERSION = 1
SECONDS_BETWEEN_TABLES = 5.0


@dataclass(frozen=True)
class FeatureTableMeta:
    """Where the features of a table come from.

    Attributes:
        encoder_name: name or path that the encoder was loaded by.
        encoder_sha256: of its weights.
        preparation: how the slices were made, JSON values.
    """

    encoder_name: str
    encoder_sha256: str
    preparation: dict[str, Any]


class FeatureTableWriter:
    """Adds scans to a table; used as a context manager, or closed by hand, so that the last rows reach
    ``scans.tsv``.
    """

    def __init__(
        self,
        table_dir: str | Path,
        *,
        encoder_name: str,
        encoder_sha256: str,
        preparation: Mapping[str, Any],
    ) -> None:
        """Start a table in ``table_dir``, or go on with the one that is there.

        Raises:
            ValueError: the folder holds features of another encoder or another preparation.
        """
        self.table_dir = Path(table_dir)
        meta = FeatureTableMeta(encoder_name, encoder_sha256, json.loads(json.dumps(dict(preparation))))
        self._scans: dict[str, Scan] = {}
        if (self.table_dir / "features.json").exists():
            _refuse_another_source(self.table_dir, found=_read_meta(self.table_dir), wanted=meta)
            if (self.table_dir / "scans.tsv").exists():
                self._scans = {scan.scan_id: scan for scan in read_scans(self.table_dir / "scans.tsv")}
        else:
            write_json(
                self.table_dir / "features.json",
                {
                    "format": FORMAT,
                    "version": FORMAT_VERSION,
                    "encoder_name": meta.encoder_name,
                    "encoder_sha256": meta.encoder_sha256,
                    "preparation": meta.preparation,
                },
            )
        self._last_table = time.monotonic()

    def keep(self, scan: Scan, *, newer_than: float = 0.0) -> bool:
        """Return whether the features of ``scan`` are here already, and list the scan in that case.

        Args:
            scan: what is asked for. (A killed run can leave a finished file that the table does not list yet.)
            newer_than: modification time of the scan's own files, seconds since 1970; older features are not kept.
        """
        path = _cls_path(self.table_dir, scan)
        if not path.exists() or path.stat().st_mtime < newer_than:
            self._scans.pop(scan.scan_id, None)
            return False
        self._scans[scan.scan_id] = scan
        return True

    def add(self, scan: Scan, cls: np.ndarray) -> None:
        """Write the CLS tokens (num_slices, D) of one scan; a scan added before is replaced.

        Raises:
            ValueError: not a two-dimensional array of finite numbers.
        """
        if cls.ndim != 2 or not cls.size:
            raise ValueError(f"features of {scan.path}: found shape {cls.shape}; expected (num_slices, D)")
        if not np.isfinite(cls).all():
            raise ValueError(
                f"features of {scan.path}: {int((~np.isfinite(cls)).sum())} values are not finite. "
                "Look at the scan, or at the encoder if all scans end like this"
            )
        with replace_file(_cls_path(self.table_dir, scan)) as temporary:
            np.save(temporary, cls.astype(np.float32))
        self._scans[scan.scan_id] = scan
        # Rewriting the table at every scan would make a large cohort quadratic.
        if time.monotonic() - self._last_table > SECONDS_BETWEEN_TABLES:
            self.close()

    def close(self) -> None:
        """Write ``scans.tsv``; the writer can go on afterwards."""
        write_scans(self.table_dir / "scans.tsv", list(self._scans.values()))
        self._last_table = time.monotonic()

    def __enter__(self) -> "FeatureTableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FeatureTable:
    """A table read back.

    Attributes:
        table_dir: its folder.
        meta: which encoder and preparation made it.
        scans: its scans, in the order of the rows of ``features``.
    """

    def __init__(self, table_dir: str | Path) -> None:
        """Open a table.

        Raises:
            ValueError: the folder is no feature table, or one of a newer version.
        """
        self.table_dir = Path(table_dir)
        self.meta = _read_meta(self.table_dir)
        if not (self.table_dir / "scans.tsv").exists():
            raise ValueError(f"{self.table_dir}: no scans.tsv, extraction never got to a scan; run extract again")
        self.scans: list[Scan] = read_scans(self.table_dir / "scans.tsv")

    def __len__(self) -> int:
        return len(self.scans)

    @cached_property
    def features(self) -> np.ndarray:
        """(n, D) float32: the mean of each scan's slice CLS tokens (paper sec. 4.3)."""
        if not self.scans:
            raise ValueError(f"{self.table_dir}: the table has no scans; run extract again")
        return np.stack([self.slices(scan).mean(axis=0) for scan in self.scans])

    def slices(self, scan: Scan) -> np.ndarray:
        """Return the CLS tokens of one scan, (num_slices, D) float32, from the lowest slice to the highest.

        Raises:
            ValueError: the scan is not in the table, or its file is damaged.
        """
        path = _cls_path(self.table_dir, scan)
        try:
            cls = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no features of {scan.path} in this table; run extract again") from error
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged features ({error}); delete the file and run extract again") from error
        return cls


def _cls_path(table_dir: Path, scan: Scan) -> Path:
    return table_dir / "cls" / f"{scan.scan_id}.npy"


def _read_meta(table_dir: Path) -> FeatureTableMeta:
    path = table_dir / "features.json"
    if not path.exists():
        raise ValueError(f"{table_dir}: no features.json here; expected a folder made by extract")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT or content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found {content.get('format')!r} version {content.get('version')!r}; "
            f"expected {FORMAT!r} version {FORMAT_VERSION}; extract again with this version of braindino"
        )
    return FeatureTableMeta(content["encoder_name"], content["encoder_sha256"], content["preparation"])


def _refuse_another_source(table_dir: Path, *, found: FeatureTableMeta, wanted: FeatureTableMeta) -> None:
    if found.encoder_sha256 != wanted.encoder_sha256:
        raise ValueError(
            f"{table_dir}: holds features of encoder {found.encoder_name!r} (weights {found.encoder_sha256[:12]}), "
            f"asked for {wanted.encoder_name!r} (weights {wanted.encoder_sha256[:12]}); "
            "give each encoder a folder of its own, or delete this one"
        )
    if found.preparation != wanted.preparation:
        raise ValueError(
            f"{table_dir}: holds features prepared as {found.preparation}, asked for {wanted.preparation}; "
            "give each preparation a folder of its own, or delete this one"
        )
