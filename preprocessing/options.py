"""What `braindino prepare` can be told."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

SkullStripName = Literal["hd-bet", "hd-bet-offline", "none"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn raw scans into brain masks and a slice store, with a row in DIR/scans.tsv for every input file.

    SOURCE is a folder, a file or a quoted pattern such as 'data/**/*_T1w.nii.gz'; BIDS datasets are understood. Run
    it again to go on after an interruption or to add other sources to the same DIR: only what is missing or changed
    is done. Exit code 0: all done; 3: finished, but some scans are quarantined.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Folders, files or quoted glob patterns."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results: scans.tsv, store/, masks/, montages/, cases/."""
    skull_strip: SkullStripName = "none"
    """Tool for the brain masks. Scans that are stripped already are recognised and left as they are."""
    jobs: int = min(4, os.cpu_count() or 1)
    """Processes; each needs about 1 GB, 3 GB with skull-stripping. 0 works without processes, for debugging."""
    seed: int = 0
    """Of the choice of 128 slices per scan."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where skull-stripping runs; auto takes a GPU when there is one."""
    cohort: str = ""
    """Name of the dataset; by default the name of each source folder."""
    sequence: Literal["T1", "T1c", "T2", "FLAIR"] | None = None
    """Sequence of the files whose name does not tell it; they are 'unknown' otherwise."""
    subject_pattern: str = ""
    """Regular expression searched in each path below its source, with a named group 'subject' and, if wanted,
    'session' and 'sequence', e.g. '(?P<subject>BraTS-GLI-[0-9]+)-(?P<session>[0-9]+)'."""
    dry_run: bool = False
    """Only tell what would be done."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("SOURCE: none given; expected at least one folder, file or quoted pattern")
        if self.jobs < 0:
            raise ValueError(f"--jobs: found {self.jobs}; expected 0 or more")
        self.compiled_subject_pattern()

    def compiled_subject_pattern(self) -> re.Pattern[str] | None:
        """``subject_pattern``, ready to search; None when not given."""
        if not self.subject_pattern:
            return None
        try:
            pattern = re.compile(self.subject_pattern)
        except re.error as error:
            raise ValueError(f"--subject-pattern {self.subject_pattern!r}: {error}") from error
        if "subject" not in pattern.groupindex or set(pattern.groupindex) - {"subject", "session", "sequence"}:
            raise ValueError(
                f"--subject-pattern {self.subject_pattern!r}: found groups {sorted(pattern.groupindex)}; "
                "expected (?P<subject>...) and, if wanted, (?P<session>...) and (?P<sequence>...)"
            )
        return pattern
