"""The sections of results: segmentation, tasks, robustness, representation, and what was audited.

Every number leads to its cases (``cases``), and the folder's paper figures stand beside the tables, inline and as files
for print.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import quote

from braindino.leakage import NO_OVERLAP
from braindino.records import read_json
from braindino.report import figures, representation_figures, robustness_figures, survival_figures, task_figures
from braindino.report.cases import (
    ScanIndex,
    cell_anchor,
    encoder_page,
    page_name,
    read_encoder_predictions,
    scans_of_cases,
    segmentation_page,
)
from braindino.report.finite import finite_numbers
from braindino.report.markup import Html, details, drawing, element, figure, join, table
from braindino.report.print_style import Drawing, TooManySeriesError
from braindino.report.sections import TALL_FROM_ROWS, Content, drawn, gallery, link_to, make_content
from braindino.report.segmentation_figures import dice_ratio_figure
from braindino.representation_tables import CKA_FILE, SPREAD_FILE, read_cka, read_spread
from braindino.robustness_table import read_robustness
from braindino.segmentation_scores import format_mean, read_comparisons, read_overview, read_scores
from braindino.task_summary import read_task_summary
from braindino.task_tables import CALIBRATION_FILE, PREDICTIONS_FILE, SURVIVAL_CURVES_FILE

MAX_OVERLAYS = 8
FIGURES_FOLDER = "figures"
PRINT_SCALE = 1.5
"""Figures for print have small type; on a screen they are shown larger."""
ROBUSTNESS_FILE = "robustness.tsv"


def segmentation_section(root: Path) -> Content:
    """Dice per region, beside its floor, of every ``scores.json`` below ``nnunet/``; cases and outlines on pages."""
    paths = sorted((root / "nnunet").rglob("scores.json"))
    if not paths:
        return Content(None, "No nnunet/**/scores.json here: no segmentation was scored in this folder.")
    scores = {_predictions_name(root / "nnunet", path): read_scores(path) for path in paths}
    index, taken = ScanIndex.of(root), set[str]()
    pages = {}
    for name, path in zip(scores, paths, strict=True):
        address = page_name(f"segmentation-{name}", taken)
        pages[name] = (address, segmentation_page(name, scores[name], path.parent, root, index))
    datasets: dict[tuple[str, ...], list[str]] = {}
    for name, score in scores.items():
        datasets.setdefault(tuple(score.summary), []).append(name)
    parts: list[object] = []
    for regions, names in datasets.items():
        lines: list[list[object]] = [
            [
                name,
                len(scores[name].cases),
                *(
                    element("a", format_mean(row.mean, row.sd), href=quote(pages[name][0]))
                    for row in scores[name].summary.values()
                ),
            ]
            for name in names
        ]
        first = scores[names[0]]
        if not all(math.isnan(row.floor) for row in first.summary.values()):
            floors = [format_mean(row.floor, math.nan) for row in first.summary.values()]
            lines.append(["floor: the whole brain", len(first.cases), *floors])
        caption = (
            "Dice per region, mean over cases ± standard deviation; a region empty in both is not counted. "
            "A number leads to its cases."
        )
        of_case = {
            name: {region: finite_numbers(case[region] for case in scores[name].cases.values()) for region in regions}
            for name in names
        }
        parts += [
            table(["predictions", "cases", *regions], lines, caption=caption),
            _overlap_notice({name: scores[name].pretraining_overlap for name in names}),
            drawn(figures.dice_figure(of_case, regions), "Dice of every case (small dots) and its mean (large)."),
        ]
    drawings, more = _dice_drawings(root / "nnunet")
    parts += [_print_figure(name, each) for name, each in drawings]
    overlays = []
    for name, path in zip(scores, paths, strict=True):
        found = sorted(path.parent.glob("*.png"))[:MAX_OVERLAYS]
        overlays += found
        if found:
            parts += [element("h3", f"Overlays: {name}"), gallery(found, class_="wide")]
    content = make_content(root, parts, [*paths, *more, *overlays], linked=paths)
    return content._replace(pages=list(pages.values()), drawings=drawings, scans=index.shown)


def tasks_section(root: Path) -> Content:
    """Estimates with intervals beside their floors, one part per ``eval/<task>/summary.tsv``; cases on pages."""
    paths = sorted((root / "eval").glob("*/summary.tsv"))
    if not paths:
        return Content(None, "No eval/*/summary.tsv here: no task was evaluated in this folder.")
    parts: list[object] = []
    files: list[Path] = []
    pages: list[tuple[str, str]] = []
    index, taken = ScanIndex.of(root), set[str]()
    drawings, refused = _task_drawings([path.parent for path in paths])
    parts += [element("p", f"Not drawn: {words}") for words in refused]
    parts += [_print_figure(name, each) for name, each in drawings if "/" not in name]
    for path in paths:
        rows = read_task_summary(path)
        addresses: dict[str, str] = {}
        scans_of = scans_of_cases(path.parent)
        for encoder in dict.fromkeys(row["encoder"] for row in rows):
            predictions = read_encoder_predictions(path.parent, encoder)
            if predictions:
                addresses[encoder] = page_name(f"{path.parent.name}-{encoder}", taken)
                fullest = max(rows, key=lambda row: float(row["ratio"]))
                text = encoder_page(
                    path.parent.name,
                    encoder,
                    predictions,
                    scans_of,
                    index,
                    fullest=(fullest["ratio"], fullest["variant"]),
                    source="../" + link_to(root, path.parent / encoder / PREDICTIONS_FILE),
                )
                pages.append((addresses[encoder], text))
        parts += [
            element("h3", path.parent.name.replace("_", " "), id=f"task-{len(files)}"),
            *_task_parts(rows, addresses),
        ]
        own = f"{path.parent.name}/"
        parts += [_print_figure(name, each) for name, each in drawings if name.startswith(own)]
        beside = [each for each in (path.with_name("run.json"), *sorted(path.parent.glob("*.tsv"))) if each.is_file()]
        beside += sorted(path.parent.glob(f"*/{PREDICTIONS_FILE}"))
        files += [path, *beside]
        links = [element("a", each.relative_to(path.parent).as_posix(), href=link_to(root, each)) for each in beside]
        command = _command(beside[0]) if beside[0].name == "run.json" else None
        parts.append(details("Every table, and the command that made them", join([*links, command], " ")))
    content = make_content(root, parts, files, linked=paths)
    flat = [(name.replace("/", "-"), each) for name, each in drawings]
    return content._replace(pages=pages, drawings=flat, scans=index.shown)


def robustness_section(root: Path) -> Content:
    """What tasks still reach on perturbed scans, of every ``robustness.tsv`` in the folder (paper sec. 4.5)."""
    paths = _tables(root, ROBUSTNESS_FILE)
    if not paths:
        return Content(None, "No robustness.tsv here: no perturbed scans were scored in this folder.")
    parts: list[object] = []
    drawings: list[tuple[str, Drawing]] = []
    for number, path in enumerate(paths):
        rows = read_robustness(path)
        name = "robustness" if len(paths) == 1 else f"robustness-{number + 1}"
        each = robustness_figures.perturbation_figure(rows)
        drawings.append((name, each))
        parts += [element("h3", path.parent.name.replace("_", " ")), _print_figure(name, each)]
        told = list(dict.fromkeys(row.warnings for row in rows if row.warnings))
        if told:
            parts.append(element("p", element("b", "Before you believe it. "), " ".join(told)))
        parts.append(details("Every number", table(each.columns, each.rows, tall=len(each.rows) > TALL_FROM_ROWS)))
    return make_content(root, parts, paths)._replace(drawings=drawings)


def representation_section(root: Path) -> Content:
    """How encoders see the same scans, of every ``cka.tsv`` and ``spread.tsv`` in the folder (paper sec. 4.6)."""
    paths = _tables(root, CKA_FILE)
    spreads = _tables(root, SPREAD_FILE)
    if not paths and not spreads:
        return Content(None, "No cka.tsv and no spread.tsv here: encoders were not compared in this folder.")
    parts: list[object] = []
    drawings: list[tuple[str, Drawing]] = []
    for number, path in enumerate(paths):
        name = "cka" if len(paths) == 1 else f"cka-{number + 1}"
        each = representation_figures.cka_figure(read_cka(path))
        drawings.append((name, each))
        parts.append(_print_figure(name, each))
        parts.append(details("Every number", table(each.columns, each.rows, tall=len(each.rows) > TALL_FROM_ROWS)))
    for path in spreads:
        lines = [
            [
                row.encoder,
                row.group,
                row.depth,
                row.n,
                row.dim,
                *(f"{value:.3g}" for value in (row.effective_rank, row.participation_ratio, row.mean_cosine)),
            ]
            for row in read_spread(path)
        ]
        header = ["encoder", "cohort", "depth", "scans", "features", "effective rank", "participation", "mean cosine"]
        caption = "How much room the features take: of few effective dimensions, or in a narrow cone, they say little."
        parts.append(table(header, lines, caption=caption, tall=len(lines) > TALL_FROM_ROWS))
    return make_content(root, parts, [*paths, *spreads])._replace(drawings=drawings)


def audit_section(root: Path) -> Content:
    """What was checked against what the encoders were pretrained on, and who was held out."""
    lines: list[list[object]] = []
    files: list[Path] = []
    held_out = root / "held-out.txt"
    if held_out.is_file():
        files.append(held_out)
        subjects = [line for line in held_out.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [line for line in subjects if not line.startswith("#")]
        lines.append(["held-out.txt", f"{len(kept)} subjects held out before any training", "", ""])
    run = root / "pretrain" / "run.json"
    if run.is_file():
        files.append(run)
        excluded = read_json(run).get("excluded_subjects")
        names = excluded.get("subjects", []) if isinstance(excluded, dict) else []
        lines.append(["pretraining", f"{len(names)} subjects left out of the slices", "", ""])
    for path in sorted((root / "nnunet").glob("raw/*/pretraining_overlap.json")):
        files.append(path)
        found = read_json(path)
        lines.append([path.parent.name, "test subjects of the dataset", Path(str(found.get("pretrained_on", ""))).name,
                      (str(found.get("pretraining_overlap", "unknown")))])  # fmt: skip
    for path in sorted((root / "eval").glob("*/summary.tsv")):
        files.append(path)
        for encoder, row in {row["encoder"]: row for row in read_task_summary(path)}.items():
            what = f"{row['test_subjects']} test subjects"
            lines.append([path.parent.name.replace("_", " "), what, encoder, (row["pretraining_overlap"])])
    for path in sorted((root / "nnunet").rglob("scores.json")):
        files.append(path)
        scores = read_scores(path)
        subjects = sorted(set(scores.subject_of.values()) or set(scores.cases))
        name = _predictions_name(root / "nnunet", path)
        lines.append([f"segmentation {name}", f"{len(subjects)} scored subjects", name, (scores.pretraining_overlap)])
    if not lines:
        return Content(None, "Nothing was checked against pretraining in this folder.")
    caption = (
        "Whether test subjects were pretrained on, under whatever name: none, or what was found. "
        "Unknown: the encoder does not say what it was pretrained on."
    )
    header = ["where", "what was checked", "encoder", "seen in pretraining"]
    return make_content(
        root, [table(header, lines, caption=caption, tall=len(lines) > TALL_FROM_ROWS)], files, linked=[]
    )


def _task_parts(rows: Sequence[Mapping[str, str]], addresses: Mapping[str, str]) -> list[object]:
    """The figure of the main metric at the largest share of labels, and the table of everything."""
    share = max(rows, key=lambda row: float(row["ratio"]))["ratio"]
    metric = rows[0]["metric"]
    shown = [row for row in rows if row["ratio"] == share and row["metric"] == metric]
    estimates = []
    for row in shown:
        label = ", ".join(filter(None, (row["encoder"], row["variant"])))
        estimates.append(_estimate(label, [row[name] for name in ("estimate", "low", "high")], _series(row["encoder"])))
    floors = {
        row["baseline_name"]: [row[name] for name in ("baseline", "baseline_low", "baseline_high")] for row in shown
    }
    estimates += [_estimate(name, floor, None) for name, floor in floors.items()]
    better = "lower is better" if metric.startswith(("mae", "rmse")) else "higher is better"
    caption = (
        f"{metric} on {shown[0]['test_subjects']} held-out subjects, trained on {shown[0]['train_subjects']} "
        f"({float(share):.0%} of the labels), mean of {shown[0]['seeds']} seed(s), 95 % interval; "
        f"hollow: trivial baseline. {shown[0]['data']}"
    )
    limits = None if metric.startswith(("mae", "rmse")) else (0.0, 1.02)
    plot = figures.interval_figure(estimates, xlabel=f"{metric}, {better}", limits=limits)
    variants = any(row["variant"] for row in rows)
    clinical = any(row["clinical"] != "n/a" for row in rows)
    lines = [
        [
            row["encoder"],
            *([row["variant"]] if variants else []),
            f"{float(row['ratio']):.0%}",
            row["train_subjects"],
            row["metric"],
            _to_cases(row, addresses),
            _with_interval(row["baseline"], row["baseline_low"], row["baseline_high"]),
            row["baseline_name"],
            *([_with_interval(row["clinical"], row["clinical_low"], row["clinical_high"])] if clinical else []),
        ]
        for row in rows
    ]
    header = ["encoder", *(["variant"] if variants else []), "labels", "trained on", "metric", "estimate", "baseline"]
    header += ["which", *(["clinical facts alone"] if clinical else [])]
    stamps = {row["encoder"]: row["pretraining_overlap"] for row in rows}
    warned = list(dict.fromkeys(f"{row['encoder']}: {row['warnings']}" for row in rows if row["warnings"]))
    return [
        # Of neighbours the curves over k show the same.
        None if variants else drawn(plot, caption),
        _overlap_notice(stamps),
        element("p", element("b", "Warnings. "), "; ".join(warned)) if warned else None,
        table(header, lines, caption="An estimate leads to its cases." if addresses else None,
              tall=len(lines) > TALL_FROM_ROWS),
    ]  # fmt: skip


def _to_cases(row: Mapping[str, str], addresses: Mapping[str, str]) -> object:
    text = _with_interval(row["estimate"], row["low"], row["high"])
    address = addresses.get(row["encoder"])
    if address is None:
        return text
    return element("a", text, href=f"{quote(address)}#{cell_anchor(row['ratio'], row['variant'])}")


def _task_drawings(folders: Sequence[Path]) -> tuple[list[tuple[str, Drawing]], list[str]]:
    """The paper figures that the folder's tasks allow, those of one task called ``TASK/NAME``; and why others are not
    drawn."""
    runs = [task_figures.read_task_run(folder) for folder in folders]
    curves = [run for run in runs if len({row.ratio for row in run.scores if not row.variant}) > 1]
    neighbours = [run for run in runs if any(row.variant.startswith("k=") for row in run.scores)]
    strata = [run for run in runs if run.strata]
    families: list[tuple[str, Callable[[], Drawing]]] = []
    if curves:
        families.append(("ratios", lambda: task_figures.ratio_figure(curves)))
    if strata:
        families.append(("strata", lambda: task_figures.strata_figure(strata)))
    if neighbours:
        families.append(("knn", lambda: task_figures.knn_figure(neighbours)))
    for folder in folders:
        if (folder / SURVIVAL_CURVES_FILE).is_file():
            families.append((f"{folder.name}/survival", partial(_survival_drawing, folder)))
        if (folder / CALIBRATION_FILE).is_file():
            families.append((f"{folder.name}/calibration", partial(task_figures.calibration_drawing, folder)))
    drawings: list[tuple[str, Drawing]] = []
    refused: list[str] = []
    for name, draw in families:
        try:
            drawings.append((name, draw()))
        except TooManySeriesError as error:
            refused.append(f"{name}: {error}")
    return drawings, refused


def _survival_drawing(folder: Path) -> Drawing:
    return survival_figures.survival_figure(*survival_figures.read_survival(folder))


def _dice_drawings(folder: Path) -> tuple[list[tuple[str, Drawing]], list[Path]]:
    """Curves over label ratios of every table of ``segment-eval`` that has several, and the tables."""
    drawings: list[tuple[str, Drawing]] = []
    files: list[Path] = []
    for path in sorted(folder.glob("**/scores.tsv")):
        if path.with_name("scores.json").is_file():
            continue  # a row per case
        rows = read_overview(path)
        if len({row.ratio for row in rows}) < 2:
            continue
        compared = path.with_name("comparison.tsv")
        comparisons = read_comparisons(compared) if compared.is_file() else []
        drawings.append((f"dice-{len(drawings) + 1}", dice_ratio_figure(rows, comparisons)))
        files.append(path)
    return drawings, files


def _print_figure(name: str, each: Drawing) -> Html:
    """A figure for print, inline, with its files."""
    flat = name.replace("/", "-")
    links = [
        element("a", ending.upper(), href=quote(f"{FIGURES_FOLDER}/{flat}.{ending}"))
        for ending in ("pdf", "svg", "png", "tsv")
    ]
    shown = element(
        "div", drawing(figures.svg(each.figure, salt=flat), alt=each.caption, scale=PRINT_SCALE), class_="scroll print"
    )
    return figure(shown, join([each.caption, " ", *(part for link in links for part in (" ", link))]))


def _tables(root: Path, name: str) -> list[Path]:
    """The files of that name in the folder and one or two levels below it."""
    return sorted(path for pattern in (name, f"*/{name}", f"*/*/{name}") for path in root.glob(pattern))


def _overlap_notice(stamps: Mapping[str, str]) -> Html | None:
    """What of the test subjects was pretrained on, or is not known; nothing where all is known to be clean."""
    told = [f"{name}: {stamp}" for name, stamp in stamps.items() if stamp != NO_OVERLAP]
    return element("p", element("b", "Pretraining overlap. "), ". ".join(told)) if told else None


def _estimate(label: str, numbers: Sequence[str], series: int | None) -> figures.Estimate:
    value, low, high = (float("nan") if number == "n/a" else float(number) for number in numbers)
    return figures.Estimate(label, value, low, high, series)


def _with_interval(value: str, low: str, high: str) -> str:
    return value if "n/a" in (low, high) else f"{value} [{low}, {high}]"


def _series(encoder: str) -> int:
    """Which colour: 0 pretrained, 1 untrained, 2 no encoder at all."""
    if "untrained" in encoder:
        return 1
    return 2 if encoder == "intensity" else 0


def _command(path: Path) -> Html:
    command = read_json(path).get("provenance", {}).get("command", "")
    return element("code", " ".join(command) if isinstance(command, list) else command)


def _predictions_name(folder: Path, path: Path) -> str:
    """What was scored: the place of ``scores.json``, less a last ``scores``, which every folder of predictions has."""
    parts = path.parent.relative_to(folder).parts
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == "scores" else parts) or folder.name
