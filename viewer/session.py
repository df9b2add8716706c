"""What the page may ask for, and the answers: plain values in, plain values out, no HTTP."""

import base64
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from braindino.manifest import Scan
from braindino.slices import DEPTH
from braindino.viewer.neighbours import NeighbourTable
from braindino.viewer.scans import OpenScan, ScanShelf, mask_bytes, scan_nifti, segmentation_bytes
from braindino.viewer.token_planes import LoadedEncoder, TokenPlanes


class Session:
    """The scans, the encoders and the tables of one run of the viewer.

    Attributes:
        shelf: the scans that may be looked at; nothing else is read.
        planes: the encoders with what they were asked for last.
        tables: feature tables by the key of their encoder.
    """

    FILES: ClassVar[Mapping[str, Callable[[OpenScan], bytes]]] = {
        "volume": scan_nifti,
        "mask": mask_bytes,
        "segmentation": segmentation_bytes,
    }

    def __init__(
        self, shelf: ScanShelf, encoders: Sequence[LoadedEncoder], tables: Mapping[str, NeighbourTable]
    ) -> None:
        self.shelf = shelf
        self.planes = TokenPlanes(encoders)
        self.tables = tables

    def scene(self) -> dict[str, Any]:
        """All scans and encoders."""
        encoders = [
            {
                "key": each.key,
                "name": each.name,
                "blocks": each.encoder.num_blocks,
                "slices": each.sees_slices,
                "neighbours": each.key in self.tables,
            }
            for each in self.planes.encoders.values()
        ]
        scans = [{"key": source.key, **_row(source.scan)} for source in self.shelf.sources.values()]
        return {"scans": scans, "encoders": encoders}

    def scan_facts(self, key: str) -> dict[str, Any]:
        """What one scan is; it is opened for that.

        Raises:
            ValueError, OSError: its files cannot be used.
        """
        opened = self.shelf.open(key)
        self.planes.prepare(opened)
        scan = opened.volume
        low, high = opened.window()
        seen = np.argwhere(opened.brain.data != 0) if opened.brain.data.any() else np.zeros((1, 3))
        found = opened.segmentation.millilitres if opened.segmentation else {}
        return {
            "key": key,
            **_row(opened.source.scan),
            "shape": list(scan.shape),
            "spacing": [round(size, 4) for size in scan.spacing],
            "notes": list(scan.notes),
            "window": [low, high],
            "brain": [int(seen[:, 2].min()), int(seen[:, 2].max())],
            "centre": [int(middle) for middle in (seen.min(axis=0) + seen.max(axis=0)) // 2],
            "mask": opened.mask is not None,
            "segmentation": opened.segmentation is not None,
            "labels": [{"value": value, "ml": round(ml, 2)} for value, ml in sorted(found.items())],
            "warning": opened.warning,
        }

    def file(self, key: str, name: str) -> bytes | None:
        """A part of a scan, ``name`` one of ``FILES``; None where the scan has no such part.

        Raises:
            ValueError, OSError: as ``scan_facts``.
        """
        opened = self.shelf.open(key)
        there = {"volume": True, "mask": opened.mask is not None, "segmentation": opened.segmentation is not None}
        return self.FILES[name](opened) if there[name] else None

    def thumbnail(self, key: str, index: int) -> bytes:
        """A PNG of an axial slice of the standard cube.

        Raises:
            ValueError: no such slice, or as ``scan_facts``.
        """
        if not 0 <= index < DEPTH:
            raise ValueError(f"slice {index}: expected 0 to {DEPTH - 1}")
        stream = io.BytesIO()
        Image.fromarray(self.shelf.thumbnail(key, index)).save(stream, format="PNG")
        return stream.getvalue()

    def similarity(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The similarity map that a click asks for.

        Args:
            question: ``scan``, ``encoder`` (keys), ``block``, ``voxel`` (x, y, z), ``layer`` (z of the map),
                ``smooth``.

        Raises:
            OutsideError: there is nothing to be seen there.
            ValueError: a field is missing or wrong.
        """
        opened = self.shelf.open(str(question["scan"]))
        loaded = self._encoder(question)
        voxel = question.get("voxel")
        if not isinstance(voxel, list) or len(voxel) != 3 or not all(type(index) is int for index in voxel):
            raise ValueError(f"voxel: found {voxel!r}; expected three whole numbers, x, y and z")
        smooth = question.get("smooth", True)
        if not isinstance(smooth, bool):
            raise ValueError(f"smooth: found {smooth!r}; expected true or false")
        start = time.perf_counter()
        layer = _whole(question, "layer")
        found = self.planes.similarity(
            loaded, opened, block=_whole(question, "block"), voxel=voxel, layer=layer, smooth=smooth
        )
        tissue = found.values[found.values >= -1]
        return {
            "layer": layer,
            "map": base64.b64encode(found.values.astype("<f4").tobytes(order="F")).decode("ascii"),
            "cells": [cells.tolist() for cells in found.cells],
            "grid": [[round(float(value), 6) for value in column] for column in found.grid],
            "reference": list(found.reference),
            "referenceSlice": found.reference_index,
            "slice": found.index,
            "slices": found.count,
            "range": [round(float(tissue.min()), 4), round(float(tissue.max()), 4)] if tissue.size else None,
            "seconds": {
                "encode": round(found.encode_seconds, 4),
                "map": round(found.map_seconds, 4),
                "all": round(time.perf_counter() - start, 4),
            },
        }

    def neighbours(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The slices of the encoder's table most like the slice at a layer of the scan.

        Args:
            question: ``scan``, ``encoder`` (keys), ``layer``, ``otherCohorts``.

        Raises:
            OutsideError: the layer holds no brain.
            ValueError: a field is missing or wrong, or the encoder has no table.
        """
        opened = self.shelf.open(str(question["scan"]))
        loaded = self._encoder(question)
        table = self.tables.get(loaded.key)
        if table is None:
            raise ValueError(f"{loaded.name}: no features of this encoder were given; start with --features")
        layer = _whole(question, "layer")
        if not 0 <= layer < opened.volume.shape[2]:
            raise ValueError(f"layer {layer}: expected 0 to {opened.volume.shape[2] - 1}")
        feature = self.planes.slice_feature(loaded, opened, layer)
        other_cohorts = question.get("otherCohorts") is True
        found = table.nearest(feature, of=opened.source.scan, other_cohorts=other_cohorts)
        return {
            "neighbours": [
                {
                    **_row(each.scan),
                    "similarity": round(each.similarity, 4),
                    "slice": table.height(each.place),
                    "key": each.scan.scan_id if each.scan.scan_id in self.shelf.sources else None,
                }
                for each in found
            ],
            "searched": len(table.index.scans) * table.index.num_slices,
        }

    def _encoder(self, question: Mapping[str, Any]) -> LoadedEncoder:
        key = question.get("encoder")
        if not isinstance(key, str) or key not in self.planes.encoders:
            raise ValueError(f"encoder: found {str(key)[:64]!r}; expected one of {', '.join(self.planes.encoders)}")
        return self.planes.encoders[key]


def _row(scan: Scan) -> dict[str, str]:
    return {
        "subject": scan.subject,
        "session": scan.session,
        "sequence": scan.sequence,
        "cohort": scan.cohort,
    }


def _whole(question: Mapping[str, Any], name: str) -> int:
    value = question.get(name)
    if type(value) is not int:
        raise ValueError(f"{name}: found {value!r}; expected a whole number")
    return value
