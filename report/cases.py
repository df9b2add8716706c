"""The pages behind the numbers: for every score the cases that made it, worst first, and for every case its scans.

``cases/TASK-ENCODER.html`` holds the predictions of one encoder, a part for each label ratio and variant;
``cases/segmentation-NAME.html`` the cases of one set of predictions, with outlines where images are at hand;
``scans.html`` the rows of scans that cases refer to, and of the quarantined.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braindino.manifest import Scan, read_scans
from braindino.report.finite import finite_numbers
from braindino.report.markup import Html, Section, element, figure, join, page, picture, table
from braindino.report.print_style import thumbnail
from braindino.report.sections import SCANS_PAGE
from braindino.report.segmentation_figures import FILE_ENDING, contour_figure, cut_case, read_regions
from braindino.segmentation_scores import SegmentationScores
from braindino.tables import read_table
from braindino.task_tables import CASES_FILE, PREDICTIONS_FILE, read_predictions

CASES_FOLDER = "cases"
MAX_CASES = 1000
"""Cases listed of the score with the most labels; of 1,000 subjects with several visits the worst are shown."""
MAX_CASES_OF_OTHERS = 50
"""Of every other score."""
MAX_OUTLINES = 12
"""Cases of a set of predictions whose outlines are drawn: the worst, and the best."""
OUTLINE_MM, OUTLINE_PIXELS = 120.0, 900
_NAVIGATION = element("p", element("a", "← report", href="../index.html"), class_="lead")


class CaseScore(NamedTuple):
    """What a model made of one case, over its seeds and splits.

    Attributes:
        case: its id.
        subject: whose.
        target: the truth, as text.
        predicted: the prediction, as text.
        badness: larger is worse.
        measure: what ``badness`` says, as text.
        trials: predictions that were averaged.
    """

    case: str
    subject: str
    target: str
    predicted: str
    badness: float
    measure: str
    trials: int


@dataclass(frozen=True)
class ScanIndex:
    """The prepared scans of a folder, and those that some page refers to."""

    scans: Mapping[str, Scan]
    shown: set[str]

    @classmethod
    def of(cls, root: Path) -> "ScanIndex":
        """Those of ``prepared/scans.tsv``; none where there is no such table, or a damaged one: the section of prepared
        scans says so, and numbers are shown all the same."""
        path = root / "prepared" / "scans.tsv"
        try:
            scans = read_scans(path) if path.is_file() else []
        except ValueError:
            scans = []
        return cls({scan.scan_id: scan for scan in scans}, set())

    def links(self, ids: Iterable[str]) -> Html:
        """Links to the rows of scans, from a page in ``cases/``; ids that are not among them as text."""
        parts: list[object] = []
        ids = list(ids)
        for scan_id in ids:
            scan = self.scans.get(scan_id)
            if scan is None:
                parts.append(scan_id)
                continue
            self.shown.add(scan_id)
            # Several scans of one case are of one session: what tells them apart is the sequence.
            told = (scan.sequence,) if len(ids) > 1 else (scan.subject, scan.session, scan.sequence)
            words = " ".join(filter(None, told)) or scan_id
            parts.append(element("a", words, href=f"../{SCANS_PAGE}#{scan_anchor(scan_id)}"))
        return join(parts, ", ")


def slug(text: str) -> str:
    """The text as part of a file name or an anchor: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def scan_anchor(scan_id: str) -> str:
    """The id of a scan's row on its page."""
    return f"scan-{slug(scan_id)}"


def cell_anchor(ratio: str, variant: str) -> str:
    """The id of the part of a page that belongs to one label ratio and variant."""
    return slug("-".join(filter(None, (f"labels-{ratio}", variant))))


def page_name(stem: str, taken: set[str]) -> str:
    """``cases/STEM.html``, numbered where two stems give one name; remembered in ``taken``."""
    base = slug(stem)
    name = f"{CASES_FOLDER}/{base}.html"
    number = 1
    while name.lower() in taken:
        number += 1
        name = f"{CASES_FOLDER}/{base}-{number}.html"
    taken.add(name.lower())
    return name


def score_cases(rows: Sequence[Mapping[str, str]]) -> list[CaseScore]:
    """The cases of one cell of a task, worst first; equals in the order of the file.

    Classes: by the mean probability of the true class, or by the share of trials that were right where there are no
    probabilities. Numbers: by the mean absolute error. Survival: by the share of comparable other cases that the case
    is ranked wrongly against (an earlier death must have the higher risk).

    Args:
        rows: of ``predictions.csv``, of one label ratio and variant.
    """
    of_case: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        of_case.setdefault(row["case"], []).append(row)
    if rows and "time" in rows[0]:
        scored = _survival_scores(of_case)
    else:
        scored = [_case_score(case, group) for case, group in of_case.items()]
    return sorted(scored, key=lambda score: -score.badness)


def encoder_page(
    task: str, encoder: str, rows: Sequence[Mapping[str, str]], scans_of: Mapping[str, Sequence[str]], index: ScanIndex,
    *, fullest: tuple[str, str], source: str,
) -> str:  # fmt: skip
    """The page of one encoder's cases in one task.

    Args:
        task: its name.
        encoder: its name.
        rows: of its ``predictions.csv``.
        scans_of: case -> ids of its scans.
        index: of the folder's scans.
        fullest: ratio and variant of the score whose cases are listed in full.
        source: address of the ``predictions.csv`` from the page.
    """
    cells: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["ratio"], row["variant"]), []).append(row)
    sections = []
    for (ratio, variant), group in sorted(cells.items(), key=lambda item: item[0] != fullest):
        scored = score_cases(group)
        limit = MAX_CASES if (ratio, variant) == fullest else MAX_CASES_OF_OTHERS
        lines = [
            [
                number,
                element("span", score.case, id=f"{cell_anchor(ratio, variant)}-{slug(score.case)}"),
                element("span", score.subject),
                score.target,
                score.predicted,
                score.measure,
                score.trials,
                index.links(scans_of.get(score.case, ())),
            ]
            for number, score in enumerate(scored[:limit], start=1)
        ]
        header = ["rank", "case", "subject", "truth", "predicted", _measure_words(group), "predictions", "scans"]
        rest = len(scored) - len(lines)
        caption = f"{len(scored)} cases, worst first" + (f"; {rest} more in predictions.csv" if rest else "")
        title = f"{_percent(ratio)} of the labels" + (f", {variant}" if variant else "")
        sections.append(Section(cell_anchor(ratio, variant), title, table(header, lines, caption=caption)))
    words = element("p", "All predictions: ", element("a", "predictions.csv", href=source), class_="lead")
    heading = element("h1", f"{task.replace('_', ' ')}: {encoder}")
    return page(f"{task}: cases of {encoder}", element("header", _NAVIGATION, heading, words), sections)


def scans_of_cases(folder: Path) -> dict[str, list[str]]:
    """Case -> ids of its scans, from ``cases.tsv``; empty where there is none."""
    path = folder / CASES_FILE
    if not path.is_file():
        return {}
    return {row["case"]: row["scans"].split() for row in read_table(path, ("case", "scans")).rows}


def read_encoder_predictions(folder: Path, encoder: str) -> list[dict[str, str]] | None:
    """The rows of an encoder's predictions, None where they are not there."""
    path = folder / encoder / PREDICTIONS_FILE
    return read_predictions(path) if path.is_file() else None


def segmentation_page(name: str, scores: SegmentationScores, folder: Path, root: Path, index: ScanIndex) -> str:
    """The page of one set of predictions: its cases with Dice and HD95, worst first, and outlines.

    Args:
        name: of the predictions.
        scores: of them.
        folder: that holds their ``scores.json``.
        root: project folder.
        index: of its scans.
    """
    regions = list(scores.summary)
    ranked = sorted(scores.cases, key=lambda case: (_mean(scores.cases[case]), case))
    drawn = _outlines(ranked, folder, root)
    lines = [
        [
            number,
            element("span", case, id=f"case-{slug(case)}"),
            element("span", scores.subject_of.get(case, case)),
            *(_number(scores.cases[case].get(region, math.nan), 3) for region in regions),
            *(_number(scores.hd95.get(case, {}).get(region, math.nan), 2) for region in regions if scores.hd95),
            element("a", "outlines", href=f"#outline-{slug(case)}") if case in drawn else "–",
            index.links(_scans_of_case(case, index)),
        ]
        for number, case in enumerate(ranked[:MAX_CASES], start=1)
    ]
    header = ["rank", "case", "subject", *(f"{region} Dice" for region in regions)]
    header += [f"{region} HD95 (mm)" for region in regions if scores.hd95]
    rest = len(ranked) - len(lines)
    caption = f"{len(ranked)} cases, worst first by mean Dice" + (f"; {rest} more in scores.tsv" if rest else "")
    sections = [Section("cases", "Cases", table([*header, "picture", "scans"], lines, caption=caption))]
    if drawn:
        figures = [
            element("div", figure(picture(drawn[case], alt=f"Outlines of {case}"), case), id=f"outline-{slug(case)}")
            for case in ranked
            if case in drawn
        ]
        body = element("div", *figures, class_="gallery wide")
        title = (
            "Outlines" if len(drawn) == len(ranked) else f"Outlines of the {len(drawn) - 1} worst cases and the best"
        )
        sections.append(Section("outlines", title, body))
    else:
        words = "No outlines: the predictions, nnunet/raw/*/labelsTs and imagesTs are not all here."
        sections.append(Section("outlines", "Outlines", None, words))
    heading = element("h1", f"Segmentation: {name}")
    return page(f"Segmentation: cases of {name}", element("header", _NAVIGATION, heading), sections)


def scans_page(index: ScanIndex) -> str:
    """The page of the scans that cases refer to, and of all that were quarantined."""
    bad = [scan for scan in index.scans.values() if scan.status == "quarantined"]
    used = [index.scans[scan_id] for scan_id in sorted(index.shown) if index.scans[scan_id].status != "quarantined"]
    used.sort(key=lambda scan: (scan.cohort, scan.subject, scan.session, scan.sequence))
    sections = []
    for anchor, title, scans in (("quarantined", "Quarantined scans", bad), ("used", "Scans behind the cases", used)):
        lines = [
            [
                element("code", scan.scan_id, id=scan_anchor(scan.scan_id)),
                scan.cohort,
                scan.subject,
                scan.session,
                scan.sequence,
                scan.status,
                scan.reason,
                scan.num_slices,
                element("code", Path(scan.source or scan.path).name),
            ]
            for scan in scans
        ]
        header = ["scan", "cohort", "subject", "session", "sequence", "status", "reason", "slices", "file"]
        sections.append(Section(anchor, title, table(header, lines) if lines else None, "None."))
    back = element("p", element("a", "← report", href="index.html"), class_="lead")
    words = (
        f"{len(index.scans)} scans in prepared/scans.tsv; here are those that a case refers to, and the quarantined."
    )
    header_part = element("header", back, element("h1", "Scans"), element("p", words, class_="lead"))
    return page("Scans", header_part, sections)


def _case_score(case: str, rows: Sequence[Mapping[str, str]]) -> CaseScore:
    target = rows[0]["target"]
    probability = f"probability_{target}"
    subject, trials = rows[0]["subject"], len(rows)
    votes = Counter(row["predicted"] for row in rows)
    if probability in rows[0]:
        mean = float(np.mean([float(row[probability]) for row in rows]))
        return CaseScore(case, subject, target, votes.most_common(1)[0][0], -mean, f"{mean:.3f}", trials)
    values, truth = finite_numbers(row["predicted"] for row in rows), finite_numbers([target])
    if len(values) == trials and truth and not _are_classes(rows):
        error = float(np.mean(np.abs(np.array(values) - truth[0])))
        return CaseScore(case, subject, f"{truth[0]:.4g}", f"{np.mean(values):.4g}", error, f"{error:.3g}", trials)
    right = votes[target] / trials
    return CaseScore(case, subject, target, votes.most_common(1)[0][0], -right, f"{right:.0%}", trials)


def _are_classes(rows: Sequence[Mapping[str, str]]) -> bool:
    """Classes called 0 and 1 look like numbers; the baseline of numbers is a mean, of classes one of them."""
    return any(name.startswith("probability_") for name in rows[0]) or bool(rows[0].get("variant", "").startswith("k="))


def _survival_scores(of_case: Mapping[str, Sequence[Mapping[str, str]]]) -> list[CaseScore]:
    cases = list(of_case)
    time = np.array([float(of_case[case][0]["time"]) for case in cases])
    event = np.array([float(of_case[case][0]["event"]) > 0 for case in cases])
    column = "above_cut" if "above_cut" in of_case[cases[0]][0] else "predicted"
    risk = np.array([np.mean([float(row[column]) for row in of_case[case]]) for case in cases])
    scored = []
    for place, case in enumerate(cases):
        earlier = event[place] & (time > time[place])
        later = event & (time < time[place])
        wrong = (earlier & (risk >= risk[place])).sum() + (later & (risk <= risk[place])).sum()
        pairs = earlier.sum() + later.sum()
        share = float(wrong / pairs) if pairs else math.nan
        scored.append(
            CaseScore(
                case,
                of_case[case][0]["subject"],
                f"{time[place]:g}, {'event' if event[place] else 'censored'}",
                f"risk {risk[place]:+.3f}",
                -1.0 if math.isnan(share) else share,
                "no pair" if math.isnan(share) else f"{share:.0%} of {pairs}",
                len(of_case[case]),
            )
        )
    return scored


def _measure_words(rows: Sequence[Mapping[str, str]]) -> str:
    if "time" in rows[0]:
        return "pairs ranked wrongly"
    if any(name.startswith("probability_") for name in rows[0]):
        return "probability of the truth"
    return "predicted rightly" if _are_classes(rows) or not finite_numbers([rows[0]["target"]]) else "absolute error"


def _outlines(ranked: Sequence[str], folder: Path, root: Path) -> dict[str, bytes]:
    """Case -> PNG of reference and prediction, for the worst and the best cases whose files are here."""
    places = [folder / "predictions", folder, folder.parent]
    predictions = next((place for place in places if (place / "dataset.json").is_file()), None)
    if predictions is None:
        return {}
    predicted = {path.name.removesuffix(FILE_ENDING): path for path in predictions.glob(f"*{FILE_ENDING}")}
    # Names of cases come from a table: they choose among files that are there, and never become a path.
    references = {
        path.name.removesuffix(FILE_ENDING): path
        for path in sorted((root / "nnunet" / "raw").glob(f"*/labelsTs/*{FILE_ENDING}"))
    }
    images = {
        path.name.removesuffix(FILE_ENDING).rpartition("_")[0]: path
        for path in sorted((root / "nnunet" / "raw").glob(f"*/imagesTs/*_[0-9][0-9][0-9][0-9]{FILE_ENDING}"))
    }
    found = [case for case in ranked if case in predicted and case in references and case in images]
    if not found:
        return {}
    chosen = found if len(found) <= MAX_OUTLINES else [*found[: MAX_OUTLINES - 1], found[-1]]
    regions = read_regions(predictions)
    drawn = {}
    for case in chosen:
        cut = cut_case(case, images[case], references[case], {"prediction": predicted[case]}, regions)
        drawn[case] = thumbnail(contour_figure([cut], width_mm=OUTLINE_MM).figure, OUTLINE_PIXELS)
    return drawn


def _scans_of_case(case: str, index: ScanIndex) -> list[str]:
    """Ids of the scans of a case called ``SUBJECT_SESSION``, as the converters name them."""
    return [
        scan_id
        for scan_id, scan in index.scans.items()
        if case in (f"{scan.subject}_{scan.session}", scan.subject, f"{scan.cohort}_{scan.subject}_{scan.session}")
    ]


def _mean(row: Mapping[str, float]) -> float:
    """Mean Dice over the regions that have one; cases without any come last."""
    known = [value for value in row.values() if not math.isnan(value)]
    return float(np.mean(known)) if known else math.inf


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(ratio: str) -> str:
    return f"{float(ratio):.0%}"
