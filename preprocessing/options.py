"""What `braindino prepare` can be told."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from braindino.parts import check_part

SkullStripName = Literal["hd-bet", "hd-bet-offline", "none"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Turn raw scans into brain masks and a slice store, with a row in DIR/scans.tsv for every input.

    SOURCE is a folder, a file or a quoted pattern such as 'data/**/*_T1w.nii.gz'; BIDS datasets are understood, and
    with --cohort any cohort that `braindino cohorts` lists. Run it again to go on after an interruption or to add
    other sources to the same DIR: only what is missing or changed is done. Exit code 0: all done; 3: finished, but
    some scans are quarantined.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Folders, files or quoted glob patterns."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the results: scans.tsv, quality.tsv, store/, masks/, montages/, quarantine/, cases/, converted/."""
    cohort: str = ""
    """Which published cohort this is: a name that `braindino cohorts` lists, or a YAML file of the same form. It says
    how files, identifiers and sequences are read. Without it, names are read as they come."""
    cohort_name: str = ""
    """What to call the dataset; by default its cohort's name, or else the name of each source folder."""
    skull_strip: SkullStripName = "none"
    """Tool for the brain masks. Scans that are stripped already are recognised and left as they are."""
    mirroring: bool = False
    """Average the masks over mirrored copies of each scan: eight times the time for a slightly better border."""
    accept: Path | None = None
    """Text file with the scan_ids (first column, # for comments) of masks that the quality gate stopped and that you
    have looked at and found good."""
    jobs: int | None = None
    """Processes; each needs about 1 GB, 3 GB with skull-stripping. By default up to 4, or one per GPU when stripping
    on GPUs. 0 works without processes, for debugging."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where skull-stripping runs; auto takes all GPUs when there are any."""
    scheduler: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = ""
    """Work on an existing Dask cluster: tcp://host:port or a scheduler file; --jobs then means nothing."""
    part: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Do only the I-th of N parts (1 to N), as in a job array; when all are done, run once more without it."""
    of: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of parts."""
    seed: int = 0
    """Of the choice of 128 slices per scan."""
    sequence: Literal["T1", "T1c", "T2", "FLAIR"] | None = None
    """Sequence of the files whose name does not tell it; they are 'unknown' otherwise."""
    subject_pattern: str = ""
    """Regular expression searched in each path below its source, with a named group 'subject' and, if wanted,
    'session' and 'sequence': '(?P<subject>P[0-9]+)/(?P<session>[0-9]+)'."""
    recheck: bool = False
    """Read all bytes again to see whether an input has changed, instead of trusting its size and time of change."""
    dry_run: bool = False
    """Only tell what would be taken and left, and estimate slices, gigabytes and hours from a few scans."""
    probe: int = 6
    """Scans that a dry run prepares, outside DIR, for its estimate; 0 gives none."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("SOURCE: none given; expected at least one folder, file or quoted pattern")
        if self.jobs is not None and self.jobs < 0:
            raise ValueError(f"--jobs: found {self.jobs}; expected 0 or more")
        if self.probe < 0:
            raise ValueError(f"--probe: found {self.probe}; expected 0 or more")
        check_part(self.part, self.of)
        if self.scheduler and self.part is not None:
            raise ValueError("--scheduler and --part both divide the work; give one of them")
        self.compiled_subject_pattern()

    def compiled_subject_pattern(self) -> re.Pattern[str] | None:
        """``subject_pattern``, ready to search; None when not given."""
        return compile_subject_pattern(self.subject_pattern)

    def num_jobs(self, num_gpus: int) -> int:
        """Processes to start, on a machine with so many GPUs to strip on."""
        if self.jobs is not None:
            return self.jobs
        return num_gpus or min(4, os.cpu_count() or 1)


def compile_subject_pattern(text: str) -> re.Pattern[str] | None:
    """The argument of ``--subject-pattern``, ready to search; None when not given.

    Raises:
        ValueError: it is no regular expression, or has other groups than expected.
    """
    if not text:
        return None
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"--subject-pattern {text!r}: {error}") from error
    if "subject" not in pattern.groupindex or set(pattern.groupindex) - {"subject", "session", "sequence"}:
        raise ValueError(
            f"--subject-pattern {text!r}: found groups {sorted(pattern.groupindex)}; "
            "expected (?P<subject>...) and, if wanted, (?P<session>...) and (?P<sequence>...)"
        )
    return pattern
