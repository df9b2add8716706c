"""``braindino report DIR``: a static folder, DIR/report, with everything that a project folder holds.

index.html shows it all; cases/ holds the cases behind every number, scans.html the scans behind the cases, figures/ the
paper figures for print. It opens from the disk without a network: no script, no request beside its own files. Built
twice from the same files with the same installation it is the same, byte for byte. ``cases`` and ``figures`` belong to
the report: what an earlier one left there goes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from braindino import __version__
from braindino.atomic import write_text
from braindino.command_line import command_line
from braindino.report import maps, result_sections, sections
from braindino.report.cases import CASES_FOLDER, ScanIndex, scans_page
from braindino.report.markup import Html, Section, element, page
from braindino.report.print_style import Drawing, save_drawing
from braindino.report.result_sections import FIGURES_FOLDER


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
    Part("segmentation", "Segmentation", result_sections.segmentation_section),
    Part("tasks", "Tasks", result_sections.tasks_section),
    Part("robustness", "Robustness", result_sections.robustness_section),
    Part("representation", "Representation", result_sections.representation_section),
    Part("audit", "What was audited", result_sections.audit_section),
    Part("made", "How it was made", sections.reproduction_section),
)


@dataclass(frozen=True)
class ReportConfig:
    """Write DIR/report: cohort, curves, maps, segmentations and results as static pages, each number with its cases.

    Open DIR/report/index.html; no network and no script is needed. A second run replaces the report.
    """

    directory: Annotated[Path, tyro.conf.arg(name="DIR", metavar="DIR")]
    """Project folder, with any of cohort/, prepared/, pretrain/, nnunet/ and eval/ in it."""


class Report(NamedTuple):
    """The pages and what went wrong on the way.

    Attributes:
        text: the HTML document of index.html.
        pages: address of every other page -> its document.
        drawings: name of every figure for print -> it with its table.
        problems: one message per section whose files could not be read; the page says the same in its place.
    """

    text: str
    pages: Mapping[str, str]
    drawings: Mapping[str, Drawing]
    problems: tuple[str, ...]


@command_line("report")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the page was written, 1 when there is nothing to show or a file could not be read."""
    config = tyro.cli(tyro.conf.Positional[ReportConfig], args=argv, prog="braindino report")
    report = build_report(config.directory)
    path = write_report(report, config.directory / "report")
    for problem in report.problems:
        print(f"braindino report: {problem}", file=sys.stderr)
    print(path)
    return 1 if report.problems else 0


def write_report(report: Report, folder: Path) -> Path:
    """Write the pages and figures, index.html last, and remove what an earlier report left in cases/ and figures/.

    Returns:
        Its index.html.
    """
    written = set()
    for name, drawing in report.drawings.items():
        written |= set(save_drawing(drawing, folder / FIGURES_FOLDER / name))
    for address, text in report.pages.items():
        write_text(folder / address, text)
        written.add(folder / address)
    write_text(folder / "index.html", report.text)
    for own in (folder / CASES_FOLDER, folder / FIGURES_FOLDER):
        for path in own.glob("*"):
            if path.is_file() and path not in written:
                path.unlink()
    return folder / "index.html"


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
    pages: dict[str, str] = {}
    drawings: dict[str, Drawing] = {}
    used: set[str] = set()
    problems: list[str] = []
    for anchor, title, build in PARTS:
        try:
            content = build(directory)
        except (ValueError, OSError) as error:
            problems.append(f"{title}: {error}")
            content = sections.Content(None, f"Could not be read: {error}")
        files.update(content.files)
        pages.update(content.pages)
        drawings.update(content.drawings)
        used.update(content.scans)
        shown.append(Section(anchor, title, content.body, content.missing))
    if not files and not problems:
        raise ValueError(
            f"{directory}: nothing to report; expected one or more of cohort/participants.tsv, prepared/scans.tsv, "
            "pretrain/metrics.jsonl, nnunet/**/scores.json, eval/*/summary.tsv; "
            "run `braindino demo` or the verbs that make them first"
        )
    index = ScanIndex.of(directory)
    if index.scans:
        pages[sections.SCANS_PAGE] = scans_page(ScanIndex(index.scans, used))
    name = directory.resolve().name
    text = page(f"{name}: BrainDINO report", _header(directory, name, files), shown)
    return Report(text, pages, drawings, tuple(problems))


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
