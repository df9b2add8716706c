"""``braindino report DIR``: one static page, DIR/report/index.html, with everything that a project folder holds.

The page opens from the disk without a network: no script, no other file, no request. Built twice from the same
files with the same installation it is the same, byte for byte.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from braindino import __version__
from braindino.atomic import write_text
from braindino.report import maps, sections
from braindino.report.markup import Html, Section, element, page


class Part(NamedTuple):
    """A section of the page: its ``id``, its heading, and what makes it from the folder."""

    anchor: str
    title: str
    build: Callable[[Path], sections.Content]


PARTS = (
    Part("cohort", "Cohort", sections.cohort_section),
    Part("scans", "Prepared scans", sections.preparation_section),
    Part("pretraining", "Pretraining", sections.pretraining_section),
    Part("maps", "What the encoder holds to be alike", maps.maps_section),
    Part("segmentation", "Segmentation", sections.segmentation_section),
    Part("tasks", "Tasks", sections.tasks_section),
    Part("made", "How it was made", sections.reproduction_section),
)


@dataclass(frozen=True)
class ReportConfig:
    """Write DIR/report/index.html: cohort, curves, maps, segmentations and task results on one page."""

    directory: Annotated[Path, tyro.conf.arg(name="DIR", metavar="DIR")]
    """Project folder, with any of cohort/, prepared/, pretrain/, nnunet/ and eval/ in it."""


class Report(NamedTuple):
    """A page and what went wrong on the way.

    Attributes:
        text: the HTML document.
        problems: one message per section whose files could not be read; the page says the same in its place.
    """

    text: str
    problems: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the page was written, 1 when there is nothing to show or a file could not be read."""
    config = tyro.cli(tyro.conf.Positional[ReportConfig], args=argv)
    try:
        report = build_report(config.directory)
        path = config.directory / "report" / "index.html"
        write_text(path, report.text)
    except (ValueError, OSError) as error:
        print(f"braindino report: {error}", file=sys.stderr)
        return 1
    for problem in report.problems:
        print(f"braindino report: {problem}", file=sys.stderr)
    print(path)
    return 1 if report.problems else 0


def build_report(directory: Path) -> Report:
    """The page of a project folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds nothing that the page could show.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such folder; give the project folder, the one that holds prepared/ and the like"
        )
    shown: list[Section] = []
    files: set[Path] = set()
    problems: list[str] = []
    for anchor, title, build in PARTS:
        try:
            content = build(directory)
        except (ValueError, OSError) as error:
            problems.append(f"{title}: {error}")
            content = sections.Content(None, f"Could not be read: {error}")
        files.update(content.files)
        shown.append(Section(anchor, title, content.body, content.missing))
    if not files and not problems:
        raise ValueError(
            f"{directory}: nothing to report; expected one or more of cohort/participants.tsv, prepared/scans.tsv, "
            "pretrain/metrics.jsonl, nnunet/**/scores.json, eval/*/summary.tsv; "
            "run `braindino demo` or the verbs that make them first"
        )
    name = directory.resolve().name
    return Report(page(f"{name}: BrainDINO report", _header(directory, name, files), shown), tuple(problems))


def _header(directory: Path, name: str, files: set[Path]) -> Html:
    # The newest file that is shown, not the clock: the same folder gives the same page.
    newest = max((path.stat().st_mtime for path in files), default=None)
    when = "" if newest is None else f", results of {datetime.fromtimestamp(newest, timezone.utc):%d %B %Y, %H:%M} UTC"
    notice = sections.simulation_notice(directory)
    banner = None
    if notice is not None:
        words = f"The cohort calls itself “{notice}”: its numbers were not measured on people."
        banner = element("p", element("strong", "Simulated data. "), words, class_="banner", role="note")
    return element(
        "header",
        element("h1", name),
        element("p", f"BrainDINO {__version__} report{when}", class_="lead"),
        banner,
    )


if __name__ == "__main__":
    raise SystemExit(main())
