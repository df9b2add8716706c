"""What ``extract`` and ``evaluate`` are told on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from braindino.slices import NUM_SLICES

RATIOS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # paper sec. 4.3.1


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Run a frozen encoder over all prepared scans and keep the features (paper sec. 4.3).

    Goes on where an earlier run stopped. Exit code 3 when some scans could not be used; FEATURES/quarantined.tsv
    names them.
    """

    prepared: Path
    """Folder made by `braindino prepare`."""
    encoder: str
    """Encoder file or folder, a name such as `untrained:vit_tiny`, or `intensity`, the floor without an encoder."""
    out: Path
    """Folder of the features, one per encoder; evaluate calls the encoder by the name of this folder."""
    num_slices: int = NUM_SLICES
    """Axial slices per volume, equally spaced (paper: 128)."""
    batch_size: int = 32
    """Slices per pass through the encoder."""
    jobs: int = 1
    """Threads that load volumes ahead of the encoder."""
    device: str = "auto"
    """`auto` (CUDA if there is a device), `cpu`, `cuda`, `cuda:1`..."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Train light heads on frozen features and score them on subjects never seen, beside a trivial baseline."""

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """A row of the task table: `sequence`, `brain_age` or `knn_sequence`."""
    features: tuple[Path, ...]
    """Feature folders made by extract, one per encoder; all are scored on the same scans and splits."""
    out: Path
    """Folder of the results; they go to OUT/TASK/ENCODER/seed_K/ and OUT/TASK/summary.tsv."""
    labels: tuple[Path, ...] = ()
    """BIDS folders or .tsv/.csv tables with the target; needed by tasks whose target is not in the scan itself."""
    ratios: tuple[float, ...] = RATIOS
    """Shares of the training subjects to train on; smaller sets lie in larger ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One split, one order of the training subjects and one start of the heads for each."""
    test_fraction: Annotated[float, tyro.conf.arg(metavar="SHARE")] = 0.3
    """Share of the subjects to test on."""
    test_subjects: Path | None = None
    """Subject list (as written by `braindino split`) to test on instead; all other subjects train."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of different cohorts, as for `braindino audit`."""
    allow_overlap: bool = False
    """Test on subjects that an encoder was pretrained on; the results then say so."""
    allow_subject_leak: bool = False
    """Test on persons that are trained on under another id; the results then say so."""
    device: str = "auto"
    """Where the heads are trained: `auto`, `cpu`, `cuda`..."""
