"""The sections of the page: each shows what its files in the folder hold, or says in one line that they are not there.

Every table and picture comes from files below the folder. No path read from a table is opened, but for the scan
behind the similarity maps, through ``braindino.manifest.load_brain``.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from braindino.leakage import NO_OVERLAP
from braindino.manifest import SEQUENCES, UNKNOWN_SEQUENCE, Scan, read_scans
from braindino.metrics_log import read_metrics
from braindino.provenance import versions
from braindino.report import figures
from braindino.report.markup import Html, details, drawing, element, figure, join, picture, table, tiles
from braindino.report.records import numbers, read_json, read_yaml
from braindino.scan_quality import LIMITS, ScanQuality, read_quality
from braindino.segmentation_scores import format_mean, read_scores
from braindino.tables import Table, read_table
from braindino.task_summary import read_task_summary

# The paper's cohorts are 33.
MAX_MONTAGES = 40
MAX_THUMBNAILS = 24
THUMBNAIL_WIDTH, MONTAGE_WIDTH = 480, 1100
GATE_TITLES = {
    "brain_ml": ("Volume", "ml"),
    "largest_component": ("In one piece", "share"),
    "border": ("On the border", "share"),
    "agreement": ("Second opinion", "Dice"),
    "covered": ("Brain covered", "share"),
    "holes": ("Holes", "share"),
    "inside": ("Where a brain can be", "share"),
}
MAX_OVERLAYS = 8
TALL_FROM_ROWS = 14
CURVES = {
    "loss": "loss",
    "dino": "DINO",
    "ibot": "iBOT",
    "koleo": "KoLeo",
    "teacher_entropy": "teacher entropy, nats",
    "feature_std": "spread of features",
    "feature_rank": "rank of features",
    "lr": "learning rate",
}
KEY_SETTINGS = (
    ("architecture", "model.architecture"),
    ("prototypes", "model.num_prototypes"),
    ("iterations planned", "iterations"),
    ("slices per iteration", "batch_size"),
    ("global crops, px", "crops.global_sizes"),
    ("local crops, px", "crops.local_sizes"),
    ("local crops per slice", "crops.num_local"),
    ("masked share of a masked crop", "masks.ratios"),
    ("weight of iBOT", "loss.ibot_weight"),
    ("weight of KoLeo", "loss.koleo_weight"),
    ("peak base learning rate", "optimizer.base_lr"),
    ("warm-up, iterations", "optimizer.warmup_iterations"),
    ("weight decay", "optimizer.weight_decay"),
    ("layer-wise decay", "optimizer.layer_decay"),
    ("teacher momentum", "optimizer.teacher_momentum"),
    ("seed", "seed"),
)


class Content(NamedTuple):
    """What a section holds.

    Attributes:
        body: its content; None when its files are not there.
        missing: the one line that says so.
        files: the files it was made from.
    """

    body: Html | None
    missing: str = ""
    files: Sequence[Path] = ()


def cohort_section(root: Path) -> Content:
    """Who was scanned: subjects, visits, sequences, sites, ages, from participants.tsv and the names of the files."""
    path = root / "cohort" / "participants.tsv"
    if not path.is_file():
        return Content(None, "No cohort/participants.tsv here, so ages, sites and labels are not shown.")
    participants = read_table(path)
    rows = participants.rows
    scans = [_bids_sequence(file.name) for file in sorted(path.parent.glob("sub-*/**/anat/*.nii*"))]
    visits = [folder for folder in path.parent.glob("sub-*/ses-*") if folder.is_dir()]
    ages = numbers(row.get("age") for row in rows)
    sites = Counter(row["site"] for row in rows if row.get("site"))
    sequences = Counter(scans)
    in_order = {name: sequences[name] for name in (*SEQUENCES, UNKNOWN_SEQUENCE) if sequences[name]}
    facts: list[tuple[object, object]] = [(len(rows), "subjects")]
    if visits:
        facts.append((len(visits), "visits"))
    if scans:
        facts.append((len(scans), "scans"))
    if sites:
        facts.append((len(sites), "sites"))
    if ages:
        facts.append((f"{min(ages):.0f}–{max(ages):.0f}", "years of age"))
    parts: list[object] = [tiles(facts)]
    if ages or in_order or sites:
        drawn = figures.cohort_figure(ages, in_order, dict(sorted(sites.items())))
        parts.append(_drawn(drawn, f"Age of {len(ages)} subjects, scans per sequence, subjects per site."))
    parts.append(details(f"All {len(rows)} subjects", _rows_table(participants)))
    return make_content(root, parts, [path])


def preparation_section(root: Path) -> Content:
    """What became of every input file, from ``prepared/scans.tsv``, and the montages."""
    path = root / "prepared" / "scans.tsv"
    if not path.is_file():
        return Content(None, "No prepared/scans.tsv here: no scans were prepared in this folder.")
    scans = read_scans(path)
    of_status = Counter(scan.status for scan in scans)
    done = [scan for scan in scans if scan.status == "done"]
    facts = [
        (of_status[status], word)
        for status, word in (("done", "scans prepared"), ("quarantined", "quarantined"), ("skipped", "skipped"))
    ]
    parts: list[object] = [tiles([*facts, (f"{sum(scan.num_slices for scan in done):,}", "slices in the store")])]

    names = [name for name in (*SEQUENCES, UNKNOWN_SEQUENCE) if any(scan.sequence == name for scan in done)]
    cohorts = sorted({scan.cohort for scan in done})
    if done:
        counts: Counter[tuple[str, str]] = Counter()
        for scan in done:
            counts[scan.cohort, scan.sequence] += scan.num_slices
        lines = [[cohort, *(f"{counts[cohort, name]:,}" for name in names)] for cohort in cohorts]
        lines = [[*line, f"{sum(counts[line[0], name] for name in names):,}"] for line in lines]
        parts.append(table(["cohort", *names, "all"], lines, caption="Slices in the store, per cohort and sequence"))

    bad = [scan for scan in scans if scan.status == "quarantined"]
    parts.append(element("h3", "Quarantined"))
    pictures: list[Path] = []
    if bad:
        codes = Counter(scan.reason.partition(":")[0] for scan in bad)
        parts.append(table(["reason code", "scans"], [[code, str(count)] for code, count in codes.most_common()]))
        shown = _evenly_by_code(bad, [scan for scan in bad if _quarantine_picture(path.parent, scan).is_file()])
        pictures = [_quarantine_picture(path.parent, scan) for scan in shown]
        parts.append(_quarantine_gallery(shown, pictures))
        lines = [
            [Path(scan.source or scan.path).name, scan.cohort, scan.subject, scan.session, scan.sequence, scan.reason]
            for scan in bad
        ]
        header = ["file", "cohort", "subject", "session", "sequence", "reason"]
        parts.append(details(f"All {len(bad)} quarantined", table(header, lines, tall=len(lines) > TALL_FROM_ROWS)))
    else:
        parts.append(element("p", "No scan was quarantined.", class_="lead"))
    skipped = Counter(scan.reason for scan in scans if scan.status == "skipped")
    if skipped:
        lines = [[reason, str(count)] for reason, count in sorted(skipped.items())]
        parts.append(details(f"{of_status['skipped']} files skipped", table(["reason", "files"], lines)))

    quality = path.parent / "quality.tsv"
    if quality.is_file():
        parts += _measured(scans, read_quality(quality))

    montages = sorted(path.parent.glob("montages/*.png"))
    first_pages = list({page.stem.rpartition("_")[0]: page for page in reversed(montages)}.values())[::-1]
    first_pages = first_pages[:MAX_MONTAGES]
    if montages:
        shrunk = [figure(picture(_thumbnail(page, MONTAGE_WIDTH), alt=page.stem), page.name) for page in first_pages]
        parts += [element("h3", "Montages"), element("div", *shrunk, class_="gallery wide")]
        if len(montages) > len(first_pages):
            more = f"{len(montages) - len(first_pages)} more pages in prepared/montages."
            parts.append(element("p", f"The first page of each cohort; {more}", class_="lead"))
    files = [path, *([quality] if quality.is_file() else []), *pictures, *first_pages]
    return make_content(root, parts, files, linked=[path])


def _measured(scans: Sequence[Scan], rows: Sequence[ScanQuality]) -> list[object]:
    """Voxel sizes, intensities, and what the quality gate saw."""
    of_scan = {scan.scan_id: scan for scan in scans}
    known = [row for row in rows if row.scan_id in of_scan]
    if not known:
        return []
    intensities = {
        name: [row.median for row in known if of_scan[row.scan_id].sequence == name]
        for name in (*SEQUENCES, UNKNOWN_SEQUENCE)
    }
    spacings = np.array([[float(size) for size in row.spacing.split("x")] for row in known])
    caption = f"Voxel sizes and intensities of the {len(known)} scans that could be read, quarantined ones included."
    parts: list[object] = [
        element("h3", "What was measured"),
        _drawn(figures.scans_figure(spacings, intensities), caption),
    ]
    gated = [row for row in known if row.brain_ml is not None]
    if gated:
        stopped = {row.scan_id for row in gated if of_scan[row.scan_id].reason.startswith("suspicious_mask")}
        measures = []
        for name, (low, high) in LIMITS.items():
            values: tuple[list[float], list[float]] = ([], [])
            for row in gated:
                values[row.scan_id in stopped].append(float(getattr(row, name)))
            measures.append(figures.GateMeasure(*GATE_TITLES[name], *values, low, high))
        caption = (
            f"The quality gate on {len(gated)} brain masks made here: {len(gated) - len(stopped)} passed, "
            f"{len(stopped)} stopped. Dashed: its limits."
        )
        parts.append(_drawn(figures.gate_figure(measures), caption))
    return parts


def _quarantine_picture(prepared: Path, scan: Scan) -> Path:
    return prepared / "quarantine" / f"{scan.scan_id}.png"


def _evenly_by_code(bad: Sequence[Scan], with_picture: Sequence[Scan]) -> list[Scan]:
    """Up to :data:`MAX_THUMBNAILS` scans to show, in turn from each reason code."""
    groups: dict[str, list[Scan]] = {scan.reason.partition(":")[0]: [] for scan in bad}
    for scan in with_picture:
        groups[scan.reason.partition(":")[0]].append(scan)
    turns = zip_longest(*groups.values())
    return [scan for turn in turns for scan in turn if scan is not None][:MAX_THUMBNAILS]


def _quarantine_gallery(scans: Sequence[Scan], pictures: Sequence[Path]) -> Html:
    shown = []
    for scan, path in zip(scans, pictures, strict=True):
        label = " ".join(filter(None, [scan.cohort, scan.subject, scan.session, scan.sequence]))
        shown.append(figure(picture(_thumbnail(path, THUMBNAIL_WIDTH), alt=label), f"{label}: {scan.reason}"))
    return element("div", *shown, class_="gallery")


def _thumbnail(path: Path, width: int) -> bytes:
    """The PNG, no wider than that and in 128 colours: a page holds many of them."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((width, small.height))
    small.quantize(128).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def pretraining_section(root: Path) -> Content:
    """Curves of the run in ``pretrain/``, its settings and its encoder."""
    run = root / "pretrain"
    metrics, config, about = run / "metrics.jsonl", run / "config.yaml", run / "encoder" / "encoder.json"
    if not metrics.is_file():
        return Content(None, "No pretrain/metrics.jsonl here: no encoder was pretrained in this folder.")
    files = [metrics]
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"{metrics}: no complete line; expected one JSON object per logged iteration")
    settings: Mapping[str, Any] = {}
    if config.is_file():
        files.append(config)
        settings = read_yaml(config)
    encoder: Mapping[str, Any] = {}
    if about.is_file():
        files.append(about)
        encoder = read_json(about)

    planned = _setting(settings, "iterations")
    done = f"{rows[-1]['iteration']:,}"
    facts: list[tuple[object, object]] = [
        (done, f"iterations of {planned:,}" if isinstance(planned, int) else "iterations")
    ]
    if (architecture := _setting(settings, "model.architecture")) is not None:
        facts.append((architecture, "encoder"))
    if isinstance(encoder.get("parameters"), int):
        facts.append((f"{encoder['parameters'] / 1e6:.1f} M", "parameters"))
    expected = rows[0].get("expected_initial_loss")
    first = "first loss" if expected is None else f"first loss; {expected:.2f} expected"
    facts += [
        (f"{rows[place]['loss']:.2f}", word) for place, word in ((0, first), (-1, "last loss")) if "loss" in rows[place]
    ]
    parts: list[object] = [tiles(facts)]
    titles = {name: title for name, title in CURVES.items() if any(name in row for row in rows)}
    if titles:
        drawn = figures.curves_figure(rows, titles)
        parts.append(
            _drawn(drawn, "The run, as logged; from 100 logged iterations on, a running mean over the raw values.")
        )
    lines = [[word, _plain(value)] for word, key in KEY_SETTINGS if (value := _setting(settings, key)) is not None]
    if lines:
        parts.append(element("h3", "Recipe"))
        half = (len(lines) + 1) // 2
        columns = [table(["setting", "value"], part) for part in (lines[:half], lines[half:]) if part]
        parts.append(element("div", *columns, class_="halves"))
        parts.append(details("Every setting", element("pre", config.read_text(encoding="utf-8"))))
    if encoder:
        facts_of_encoder = [
            ["sha256 of the weights", element("code", encoder.get("sha256", "not stated"))],
            ["fingerprint of the slices", element("code", encoder.get("data_fingerprint") or "not stated")],
        ]
        parts += [element("h3", "Encoder"), table(["", ""], facts_of_encoder)]
    pictures = [path for path in (run / "progress.png", run / "maps.png") if path.is_file()]
    for path in pictures:
        parts.append(details(f"{path.name}, as the run drew it", _gallery([path], class_="wide")))
    return make_content(root, parts, [*files, *pictures], linked=files)


def segmentation_section(root: Path) -> Content:
    """Dice per region and overlays of every ``scores.json`` below ``nnunet/``."""
    paths = sorted((root / "nnunet").rglob("scores.json"))
    if not paths:
        return Content(None, "No nnunet/**/scores.json here: no segmentation was scored in this folder.")
    scores = {_predictions_name(root / "nnunet", path): read_scores(path) for path in paths}
    datasets: dict[tuple[str, ...], list[str]] = {}
    for name, score in scores.items():
        datasets.setdefault(tuple(score.summary), []).append(name)
    parts: list[object] = []
    for regions, names in datasets.items():
        lines: list[list[object]] = [
            [name, len(scores[name].cases), *(format_mean(row.mean, row.sd) for row in scores[name].summary.values())]
            for name in names
        ]
        first = scores[names[0]]
        if not all(math.isnan(row.floor) for row in first.summary.values()):
            floors = [format_mean(row.floor, math.nan) for row in first.summary.values()]
            lines.append(["floor: the whole brain", len(first.cases), *floors])
        caption = "Dice per region, mean over cases ± standard deviation; a region empty in both is not counted"
        of_case = {
            name: {region: numbers(case[region] for case in scores[name].cases.values()) for region in regions}
            for name in names
        }
        parts += [
            table(["predictions", "cases", *regions], lines, caption=caption),
            _overlap_notice({name: scores[name].pretraining_overlap for name in names}),
            _drawn(figures.dice_figure(of_case, regions), "Dice of every case (small dots) and its mean (large)."),
        ]
    overlays = []
    for name, path in zip(scores, paths, strict=True):
        found = sorted(path.parent.glob("*.png"))[:MAX_OVERLAYS]
        overlays += found
        if found:
            parts += [element("h3", f"Overlays: {name}"), _gallery(found, class_="wide")]
        tables = sorted(path.parent.glob("scores.tsv"))
        for table_path in tables:
            parts.append(details(f"Every case: {name}", _rows_table(read_table(table_path))))
    return make_content(root, parts, [*paths, *overlays], linked=paths)


def tasks_section(root: Path) -> Content:
    """Estimates with intervals beside their floors, one part per ``eval/<task>/summary.tsv``."""
    paths = sorted((root / "eval").glob("*/summary.tsv"))
    if not paths:
        return Content(None, "No eval/*/summary.tsv here: no task was evaluated in this folder.")
    parts: list[object] = []
    files: list[Path] = []
    for path in paths:
        rows = read_task_summary(path)
        parts += [element("h3", path.parent.name.replace("_", " ")), *_task_parts(path, rows)]
        beside = [each for each in (path.with_name("run.json"), path.with_name("comparisons.tsv")) if each.is_file()]
        beside += sorted(path.parent.glob("*/predictions.csv"))
        files += [path, *beside]
        if beside:
            links = [
                element("a", each.relative_to(path.parent).as_posix(), href=link_to(root, each)) for each in beside
            ]
            command = _command(beside[0]) if beside[0].name == "run.json" else None
            parts.append(details("Every case, and the command that made it", join([*links, command], " ")))
    return make_content(root, parts, files, linked=paths)


def reproduction_section(root: Path) -> Content:
    """The commands, if they were logged, and the versions of this installation."""
    parts: list[object] = []
    log = root / "commands.log"
    if log.is_file():
        parts += [element("h3", "Commands"), element("pre", log.read_text(encoding="utf-8").strip())]
    parts.append(element("h3", "Versions that made this page"))
    parts.append(
        table(["package", "version"], [[name, element("code", number)] for name, number in versions().items()])
    )
    return make_content(root, parts, [log] if log.is_file() else [])


def make_content(
    root: Path, parts: Sequence[object], files: Sequence[Path], *, linked: Sequence[Path] | None = None
) -> Content:
    """The parts, and below them links to the files they were made from, or to those in ``linked``."""
    links = [
        element("a", path.relative_to(root).as_posix(), href=link_to(root, path))
        for path in (files if linked is None else linked)
    ]
    return Content(
        join([*parts, element("p", "From ", join(links, ", "), class_="sources") if links else None]), files=files
    )


def simulation_notice(root: Path) -> str | None:
    """The words in which the cohort calls itself simulated, in its description or its README; None when it does not."""
    description = root / "cohort" / "dataset_description.json"
    texts = _texts(read_json(description)) if description.is_file() else []
    texts += [path.read_text(encoding="utf-8") for path in sorted((root / "cohort").glob("README*")) if path.is_file()]
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
            if re.search(r"\bsimulat", sentence, re.IGNORECASE):
                return sentence.strip(" #")
    return None


def link_to(root: Path, path: Path) -> str:
    """The address of a file below ``root``, relative to the page in ``root/report``."""
    return "../" + quote(path.relative_to(root).as_posix())


def _task_parts(path: Path, rows: Sequence[Mapping[str, str]]) -> list[object]:
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
    estimates += [_estimate(name, numbers, None) for name, numbers in floors.items()]
    better = "lower is better" if metric.startswith("mae") else "higher is better"
    caption = (
        f"{metric} on {shown[0]['test_subjects']} held-out subjects, trained on {shown[0]['train_subjects']} "
        f"({float(share):.0%} of the labels), mean of {shown[0]['seeds']} seed(s), 95 % interval; "
        f"hollow: trivial baseline. {shown[0]['data']}"
    )
    limits = None if metric.startswith("mae") else (0.0, 1.02)
    drawn = figures.interval_figure(estimates, xlabel=f"{metric}, {better}", limits=limits)
    variants = any(row["variant"] for row in rows)
    lines = [
        [
            row["encoder"],
            *([row["variant"]] if variants else []),
            f"{float(row['ratio']):.0%}",
            row["train_subjects"],
            row["metric"],
            _with_interval(row["estimate"], row["low"], row["high"]),
            _with_interval(row["baseline"], row["baseline_low"], row["baseline_high"]),
            row["baseline_name"],
        ]
        for row in rows
    ]
    header = [
        "encoder",
        *(["variant"] if variants else []),
        "labels",
        "trained on",
        "metric",
        "estimate",
        "baseline",
        "which",
    ]
    stamps = {row["encoder"]: row["pretraining_overlap"] for row in rows}
    return [_drawn(drawn, caption), _overlap_notice(stamps), table(header, lines, tall=len(lines) > TALL_FROM_ROWS)]


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


def _drawn(drawing_: Any, caption: str) -> Html:
    return figure(drawing(figures.svg(drawing_, salt=caption), alt=caption), caption)


def _rows_table(content: Table) -> Html:
    rows = [[row[name] for name in content.columns] for row in content.rows]
    return table(content.columns, rows, tall=len(rows) > TALL_FROM_ROWS)


def _gallery(paths: Sequence[Path], *, class_: str = "") -> Html:
    """The PNG files with their names."""
    shown = [figure(picture(path.read_bytes(), alt=path.stem), path.name) for path in paths]
    return element("div", *shown, class_=f"gallery {class_}".strip())


def _texts(value: Any) -> list[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _texts(child)]


def _setting(settings: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted key, None when there is none."""
    value: Any = settings
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _bids_sequence(name: str) -> str:
    suffix = name.partition(".nii")[0].rpartition("_")[2]
    if suffix == "T1w":
        return "T1c" if "_ce-" in name else "T1"
    return {"T2w": "T2", "FLAIR": "FLAIR"}.get(suffix, UNKNOWN_SEQUENCE)
