"""The model card of an exported encoder: README.md in Hugging Face's format, YAML front matter and Markdown."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
import yaml

from braindino.leakage import EXPOSURE_FILE, Exposure
from braindino.pretrain.loading_snippet import WEIGHTS_FILE, Format, architecture_name
from braindino.vision_transformer import VisionTransformer
from braindino.weights import RELEASED_EPS, InputContract

LICENSE_NOT_STATED = "not stated"
TRIAL_RECIPES = ("debug", "demo")
LIBRARIES: dict[Format, str] = {
    "native": "braindino",
    "teacher": "braindino",
    "dinov3": "dinov3",
    "timm": "timm",
    "hf": "transformers",
}
TAGS = ("self-supervised-learning", "vision-transformer", "dinov3", "braindino")
BRAIN_TAGS = ("brain", "mri", "medical-imaging")
"""Of an encoder that has seen brains."""
RECIPE_SETTINGS = (
    "model.architecture", "model.num_storage_tokens", "model.drop_path", "model.layer_norm_eps", "model.num_prototypes",
    "model.head_hidden_dim", "model.head_bottleneck_dim", "iterations", "batch_size", "accumulate", "seed",
    "sampling.cohort_weights", "sampling.sequence_weights",
    "crops.global_sizes", "crops.local_sizes", "crops.pair_ratios", "crops.num_local", "crops.global_scale",
    "crops.local_scale", "crops.canvas_size", "crops.flip_probability", "crops.blur_probabilities",
    "masks.probability", "masks.ratios",
    "loss.centering", "loss.student_temperature", "loss.teacher_temperature", "loss.ibot_weight", "loss.koleo_weight",
    "loss.gram_weight",
    "optimizer.base_lr", "optimizer.lr_scaling", "optimizer.min_lr", "optimizer.warmup_iterations",
    "optimizer.weight_decay", "optimizer.layer_decay", "optimizer.clip_norm", "optimizer.teacher_momentum",
)  # fmt: skip
"""Settings that a card names where the run's config.yaml has them; never a path, which would tell of a machine."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an encoder comes from, as far as its files say."""

    source: str
    """Name of the run or of the file, without its folders."""
    notes: str = ""
    """What the weights' header says of them: the recipe and the iterations done."""
    data_fingerprint: str = ""
    """Of the slice store."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that wrote the weights."""
    recipe: str = ""
    """Name of the recipe; empty where there is no run."""
    num_slices: int | None = None
    """Slices that the run draws from."""
    num_excluded: int = 0
    """Subjects that were kept out by a list."""
    global_batch: int | None = None
    """Slices per iteration, over all processes."""
    commit: str = ""
    """Commit of the code that trained."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's config.yaml, nested."""
    exposure: Exposure | None = None
    """Scans that the encoder has seen; None where nobody wrote it down."""


def write_card(
    encoder: VisionTransformer,
    origin: Origin,
    *,
    title: str,
    format: Format,
    digests: Mapping[str, str],
    snippet: str,
    read_back: VisionTransformer,
    license: str | None,
    datasets: Sequence[str],
) -> str:
    """The card's text; equal arguments give equal text.

    Args:
        encoder: that is exported.
        origin: where it comes from.
        title: heading of the card.
        format: of the export.
        digests: name -> sha256 of every other file of the export.
        snippet: Python that loads it, run in the card's folder.
        read_back: what `braindino.load_encoder` makes of the export.
        license: as given by the user; None where it was not.
        datasets: names for the front matter; empty for the cohorts that the encoder has seen.
    """
    cohorts = sorted({scan.cohort for scan in origin.exposure.scans}) if origin.exposure else []
    return "\n\n".join(
        [
            _front_matter(origin, format, license=license, datasets=list(datasets) or cohorts),
            f"# {_text(title)}",
            _summary(encoder, origin, license),
            "## Loading\n\n" + _loading(encoder, read_back, snippet, format),
            "## Input\n\n" + _input(encoder.contract or InputContract()),
            "## Data\n\n" + _data(origin),
            "## Recipe\n\n" + _recipe(origin),
            "## Intended use and limits\n\n" + _limits(origin),
            "## How it was made\n\n" + _provenance(encoder, origin, digests),
        ]
    ) + "\n"  # fmt: skip


def _front_matter(origin: Origin, format: Format, *, license: str | None, datasets: list[str]) -> str:
    values: dict[str, Any] = {}
    if license is not None:
        # The Hub knows identifiers such as apache-2.0; everything else is "other" with a name.
        identifier = re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license)
        values |= {"license": license} if identifier else {"license": "other", "license_name": _line(license)}
    tags = [*(BRAIN_TAGS if origin.settings else ()), *TAGS]
    values |= {"library_name": LIBRARIES[format], "pipeline_tag": "image-feature-extraction", "tags": tags}
    if datasets:
        values["datasets"] = [_line(name) for name in datasets]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10_000)}---"


def _summary(encoder: VisionTransformer, origin: Origin, license: str | None) -> str:
    architecture = encoder.architecture
    name = architecture_name(architecture)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    what, how, trial = "An image encoder", "", ""
    if origin.settings:
        what, how = "An encoder of axial brain-MRI slices", ", trained by self-distillation without labels"
    if origin.recipe in TRIAL_RECIPES:
        trial = (
            f"\n\n**This is the product of a trial run (recipe `{origin.recipe}`), which shows that the programs work. "
            "It is of no use as a model.**"
        )
    return (
        f"{what}: a vision transformer ({name or 'no name among ours'}, "
        f"{parameters / 1e6:.1f} million parameters, {architecture['embed_dim']} features per token, "
        f"{architecture['depth']} blocks, {architecture['num_heads']} heads, patches of {architecture['patch_size']} "
        f"pixels, {architecture['num_storage_tokens']} storage tokens, LayerNorm eps {architecture['layer_norm_eps']})"
        f"{how}. Licence: {_text(license or LICENSE_NOT_STATED)}.{trial}"
    )


def _loading(encoder: VisionTransformer, read_back: VisionTransformer, snippet: str, format: Format) -> str:
    text = f"Run in the folder that holds this file:\n\n```python\n{snippet}```"
    eps, eps_read = (each.architecture["layer_norm_eps"] for each in (encoder, read_back))
    if format == "dinov3" and eps != RELEASED_EPS:
        text += (
            "\n\nDINOv3's hub entries (`torch.hub.load(REPOSITORY, 'dinov3_vitb16', source='local', weights=FILE)`) "
            f"load the file as well, but build with LayerNorm eps {RELEASED_EPS}: set {eps} on every `LayerNorm`."
        )
    if format != "native":
        text += f"\n\n`braindino.load_encoder({WEIGHTS_FILE[format]!r})` reads it as well"
        unsaid = [f"LayerNorm eps is {eps_read} then, not {eps}"] if eps_read != eps else []
        if not torch.equal(read_back.rope_embed.periods, encoder.rope_embed.periods):
            unsaid.append("the RoPE periods are not rounded then")
        text += f", but this layout does not say all: {'; '.join(unsaid)}." if unsaid else "."
    return text


def _input(contract: InputContract) -> str:
    rows = {
        "channels": f"{contract.channels} ({contract.channel_source})",
        "size": f"{contract.image_size} x {contract.image_size} pixels, or other multiples of the patch size",
        "intensity": contract.intensity,
        "orientation": contract.orientation,
        "slices": contract.slice_axis,
    }
    return _table(("property", "value"), rows.items()) + (
        "\n\n`braindino prepare` makes such slices from raw scans (skull-stripped, cropped to the brain, resized, "
        "normalised)."
    )


def _data(origin: Origin) -> str:
    if origin.exposure is None:
        return "What the encoder was trained on was not written down by those who made the file."
    scans = origin.exposure.scans
    by_cohort = defaultdict(list)
    for scan in scans:
        by_cohort[scan.cohort].append(scan)
    rows = [
        (cohort, len({scan.subject for scan in group}), len(group), _count_sequences(group))
        for cohort, group in sorted(by_cohort.items())
    ]
    subjects = len({(scan.cohort, scan.subject) for scan in scans})
    parts = []
    if rows:
        rows.append(("all", subjects, len(scans), _count_sequences(scans)))
        parts.append(_table(("cohort", "subjects", "scans", "scans per sequence"), rows))
    else:
        parts.append("No scan.")
    if origin.num_slices is not None:
        parts.append(f"The last stage drew from {origin.num_slices} slices.")
    if origin.num_excluded:
        parts.append(f"{origin.num_excluded} subjects were kept out of it by a list, to be tested on.")
    parts += [f"Not known: {_text(line)}." for line in origin.exposure.unknown]
    if rows:
        parts.append(
            f"`{EXPOSURE_FILE}` names every scan by its cohort's own ids and by fingerprints; `braindino audit` "
            "compares a test set with it. Each cohort has terms of access and of use of its own, which may also "
            "concern models trained on it and the publication of its ids: read them before you pass this on."
        )
    return "\n\n".join(parts)


def _count_sequences(scans: Sequence[Any]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for scan in scans:
        counts[scan.sequence or "unknown"] += 1
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _recipe(origin: Origin) -> str:
    if not origin.settings:
        return "The settings of its training are not known here: the file came without a run."
    rows = [(f"`{key}`", value) for key in RECIPE_SETTINGS if (value := _setting(origin.settings, key)) is not None]
    if origin.global_batch is not None:
        rows.append(("slices per iteration, over all processes", origin.global_batch))
    if (start := _setting(origin.settings, "init_from")) is not None:
        rows.append(("started from", PurePath(start).name))
    return (
        f"Recipe `{_text(origin.recipe)}` of BrainDINO's pretraining: student and moving-average teacher, DINO, iBOT "
        "and KoLeo objectives (BrainDINO paper, sec. 4.2). This is the teacher.\n\n"
        + _table(("setting", "value"), rows)
    )


def _setting(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if value != [] else None


def _limits(origin: Origin) -> str:
    lines = [
        "For research: frozen features of brain-MRI slices for segmentation, classification, regression, retrieval.",
        "Not a medical device. Nothing here was tested for decisions about patients.",
        "It expects slices prepared as above. Scans with skull, another orientation or another normalisation give "
        "features without meaning, and no error.",
        "It sees single axial slices: what shows only across slices has to be added by the model on top.",
        "Scanners, sequences, ages, diseases and populations that are not among its data may be represented badly. "
        "Which ages, sexes and origins were among them is not recorded here, and differences between groups of people "
        "were not measured.",
        "This card reports no accuracy: measure it on subjects that the encoder has not seen.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _provenance(encoder: VisionTransformer, origin: Origin, digests: Mapping[str, str]) -> str:
    rows: list[tuple[str, Any]] = [
        ("made from", origin.source),
        ("what it is", origin.notes or "not stated in the file"),
        ("hash of the weights", f"`{encoder.sha256}`"),
        ("fingerprint of the slices", f"`{origin.data_fingerprint}`" if origin.data_fingerprint else "not recorded"),
        ("commit of the code", f"`{origin.commit}`" if origin.commit else "not recorded"),
        ("versions", ", ".join(f"{name} {version}" for name, version in origin.versions.items()) or "not recorded"),
    ]
    files = [(f"`{name}`", f"`{digest}`") for name, digest in sorted(digests.items())]
    return (
        _table(("fact", "value"), rows)
        + "\n\nThe hash is the same for equal weights in every format (`braindino.load_encoder(...).sha256`).\n\n"
        + _table(("file", "sha256"), files)
    )


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: object) -> str:
    """A value as one line of Markdown: no cell, tag or line can be ended by what a user or a table named."""
    return _line(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _line(value: object) -> str:
    """A value as one line: a line of `---` would end the front matter, even within YAML's quotes."""
    return " ".join(str(value).split())
