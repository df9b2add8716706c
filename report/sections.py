"""The sections of the page: each shows what its files in the folder hold, or says in one line that they are not there.

Every table and picture comes from files below the folder. No path read from a table is opened, but for the scan
behind the similarity maps, through ``braindino.manifest.load_brain``.
"""

import io
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from braindino.manifest import SEQUENCES, UNKNOWN_SEQUENCE, Scan, read_scans
from braindino.metrics_log import read_metrics
from braindino.provenance import versions
from braindino.records import read_json, read_yaml
from braindino.report import figures
from braindino.report.finite import finite_numbers
from braindino.report.markup import Html, details, drawing, element, figure, join, picture, table, tiles
from braindino.report.print_style import Drawing
from braindino.scan_quality import LIMITS, ScanQuality, read_quality
from braindino.tables import Table, read_table

# The paper's cohorts are 33.
MAX_MONTAGES = 40
MAX_THUMBNAILS = 24
THUMBNAIL_WIDTH, MONTAGE_WIDTH, MAPS_WIDTH = 480, 1100, 1400
GATE_TITLES = {
    "brain_ml": ("Volume", "ml"),
    "largest_component": ("In one piece", "share"),
    "border": ("On the border", "share"),
    "agreement": ("Second opinion", "Dice"),
    "covered": ("Brain covered", "share"),
    "holes": ("Holes", "share"),
    "inside": ("Where a brain can be", "share"),
}
SCANS_PAGE = "scans.html"
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
        pages: further pages: address below ``report/``, and the document.
        drawings: figures for print: name below ``report/figures/``, and the figure with its table.
        scans: ids of the scans that the pages refer to.
    """

    body: Html | None
    missing: str = ""
    files: Sequence[Path] = ()
    pages: Sequence[tuple[str, str]] = ()
    drawings: Sequence[tuple[str, Drawing]] = ()
    scans: Collection[str] = ()


def cohort_section(root: Path) -> Content:
    """Who was scanned: subjects, visits, sequences, sites, ages, from participants.tsv and the names of the files."""
    path = root / "cohort" / "participants.tsv"
    if not path.is_file():
        return Content(None, "No cohort/participants.tsv here, so ages, sites and labels are not shown.")
    participants = read_table(path)
    rows = participants.rows
    scans = [_bids_sequence(file.name) for file in sorted(path.parent.glob("sub-*/**/anat/*.nii*"))]
    visits = [folder for folder in path.parent.glob("sub-*/ses-*") if folder.is_dir()]
    ages = finite_numbers(row.get("age") for row in rows)
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
        shown_figure = figures.cohort_figure(ages, in_order, dict(sorted(sites.items())))
        parts.append(drawn(shown_figure, f"Age of {len(ages)} subjects, scans per sequence, subjects per site."))
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
        parts.append(element("p", element("a", "Their rows, and those of scans behind cases", href=SCANS_PAGE)))
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
        drawn(figures.scans_figure(spacings, intensities), caption),
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
        parts.append(drawn(figures.gate_figure(measures), caption))
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
        shown_figure = figures.curves_figure(rows, titles)
        parts.append(
            drawn(
                shown_figure, "The run, as logged; from 100 logged iterations on, a running mean over the raw values."
            )
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
    if run / "maps.png" in pictures:
        small = picture(_thumbnail(run / "maps.png", MAPS_WIDTH), alt="Maps of fixed slices as the run went on")
        caption = (
            "Similarity with a fixed patch and principal components of fixed slices, one column for each look at the "
            "teacher; "
        )
        link = element("a", "in full", href=link_to(root, run / "maps.png"))
        parts += [element("h3", "Maps over time"), figure(small, join([caption, link]))]
    if run / "progress.png" in pictures:
        parts.append(details("progress.png, as the run drew it", gallery([run / "progress.png"], class_="wide")))
    return make_content(root, parts, [*files, *pictures], linked=files)


def reproduction_section(root: Path) -> Content:
    """The commands, if they were logged, and the versions of this installation."""
    parts: list[object] = []
    log = root / "commands.log"
    if log.is_file():
        parts += [element("h3", "Commands"), element("pre", log.read_text(encoding="utf-8").strip())]
    tasks = [path.parent for path in sorted((root / "eval").glob("*/run.json"))]
    if tasks:
        lines = [["braindino", "reproduce", shlex.quote(task.relative_to(root).as_posix())] for task in tasks]
        words = "Train every head again from what the evaluation left, and compare each prediction (in this folder):"
        parts += [element("h3", "The same numbers again"), element("p", words)]
        parts.append(element("pre", "\n".join(map(" ".join, lines))))
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


def drawn(drawing_: Any, caption: str) -> Html:
    """A figure of ``figures``, inline, with its caption."""
    return figure(drawing(figures.svg(drawing_, salt=caption), alt=caption), caption)


def _rows_table(content: Table) -> Html:
    rows = [[row[name] for name in content.columns] for row in content.rows]
    return table(content.columns, rows, tall=len(rows) > TALL_FROM_ROWS)


def gallery(paths: Sequence[Path], *, class_: str = "") -> Html:
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
