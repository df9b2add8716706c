"""The slices of a feature table that are most like the slice looked at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from braindino.encoders.contract import Identity
from braindino.encoders.slice_encoder import SliceEncoder
from braindino.feature_table import FeatureTable
from braindino.manifest import Scan
from braindino.slice_neighbours import Neighbour, SliceIndex
from braindino.slices import uniform_indices
from braindino.viewer.token_planes import LoadedEncoder

NUM_NEIGHBOURS = 8


@dataclass(frozen=True, eq=False)
class NeighbourTable:
    """The slices of one feature table, for the encoder that made it.

    Attributes:
        table_dir: its folder.
        encoder: key of the encoder.
        index: the slices.
    """

    table_dir: Path
    encoder: str
    index: SliceIndex

    def nearest(self, feature: np.ndarray, *, of: Scan, other_cohorts: bool) -> list[Neighbour]:
        """The most similar slices of other subjects, one of each; with ``other_cohorts``, of other cohorts only."""
        cohort = of.cohort if other_cohorts and of.cohort else None
        return self.index.nearest(feature, count=NUM_NEIGHBOURS, but_subject=of.subject_key, but_cohort=cohort)

    def height(self, place: int) -> int:
        """The axial slice of the standard cube that is slice ``place`` of each scan of the table."""
        return int(uniform_indices(self.index.num_slices)[place])


def read_tables(folders: Sequence[Path], encoders: Iterable[LoadedEncoder]) -> dict[str, NeighbourTable]:
    """The tables by the key of the encoder that made them.

    Raises:
        ValueError: no table, one of an encoder that is not among ``encoders``, or two of the same.
    """
    known = list(encoders)
    tables: dict[str, NeighbourTable] = {}
    for folder in folders:
        table = FeatureTable(folder)
        found = [each for each in known if _same(each, table.identity)]
        if not found:
            names = ", ".join(each.name for each in known) or "none"
            raise ValueError(
                f"{folder}: features of encoder {table.identity.name!r} (weights {table.identity.sha256[:12]}), "
                f"prepared as {table.identity.preparation}; the encoders given are {names}: give --encoder with the "
                "weights and --options that made these features"
            )
        key = found[0].key
        if key in tables:
            raise ValueError(f"{folder}: features of the same encoder as {tables[key].table_dir}; give one of the two")
        tables[key] = NeighbourTable(folder, key, SliceIndex.from_table(table))
    return tables


def _same(loaded: LoadedEncoder, identity: Identity) -> bool:
    """Whether slices are encoded alike; how many are taken of a volume makes no difference to one of them."""
    encoder = loaded.encoder
    if not isinstance(encoder, SliceEncoder) or encoder.identity.sha256 != identity.sha256:
        return False
    num_slices = identity.preparation.get("num_slices")
    if not isinstance(num_slices, int):
        return False
    ours = replace(encoder.preparation, num_slices=num_slices).describe()
    return ours == identity.preparation and encoder.identity.reading["feature"] == identity.reading.get("feature")
