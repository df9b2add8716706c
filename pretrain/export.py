"""``braindino export``: a pretrained encoder as a folder that another program loads, with a model card.

    braindino export RUN --format {native,teacher,dinov3,timm,hf} --out FOLDER

The folder holds the weights in that layout, README.md (the model card) and, where it is known, pretrained_on.tsv. It
appears whole or not at all, after the weights in it were read back and found equal.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from safetensors.torch import save_file

from braindino.atomic import replace_file, sync, write_json, write_text
from braindino.command_line import command_line
from braindino.file_digest import file_digest
from braindino.leakage import EXPOSURE_FILE, exposure_of_encoder, write_exposure
from braindino.pretrain.checkpoint import load_newest_checkpoint
from braindino.pretrain.loading_snippet import WEIGHTS_FILE, Format, check_expressible, loading_snippet
from braindino.pretrain.model_card import LICENSE_NOT_STATED, Origin, write_card
from braindino.records import read_json, read_yaml
from braindino.vision_transformer import VisionTransformer
from braindino.weights import (
    EPS_KEY,
    TEACHER_HEADS,
    UNTRAINED_PREFIX,
    find_encoder_file,
    load_encoder,
    read_facts,
    save_encoder,
    to_dinov3_state,
    to_hugging_face_config,
    to_hugging_face_state,
    to_teacher_state,
    to_timm_state,
)

CARD_FILE = "README.md"
_MAX_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write an encoder in the layout of another program, with a model card, and print how to load it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Pretraining run, or any encoder that `braindino.load_encoder` knows (folder or file)."""
    format: Format
    """native: our own safetensors file. teacher: {"teacher": {"backbone.*"}}, as the BrainDINO and MedDINOv3 loaders
    read. dinov3: flat, as DINOv3's released files. timm: for timm's vit_*_patch16_dinov3. hf: for
    transformers.DINOv3ViTModel."""
    out: Path
    """Folder to write. If it exists it must hold the very same export, which is then left as it is."""
    with_heads: bool = False
    """Add the teacher's projection heads (format teacher, from a run with a checkpoint), to go on pretraining from."""
    license: str | None = None
    """Licence of the exported weights, for the card: an identifier such as cc-by-nc-4.0, or a name. It depends on the
    data and on what the training started from, so nothing is assumed."""
    datasets: tuple[str, ...] = ()
    """Names of the data sets, for the card's front matter; the cohorts in pretrained_on.tsv when not given."""
    title: str | None = None
    """Heading of the card; the name of OUT when not given."""


class Exported(NamedTuple):
    """An export on the disk."""

    folder: Path
    snippet: str
    """Python that loads it from anywhere."""
    is_new: bool
    """False when the same export was there already."""


@command_line("export")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when the export is there, 1 on an error, 2 (from tyro) on wrong usage."""
    options = tyro.cli(ExportOptions, args=argv, prog="braindino export")
    exported = export_encoder(
        options.run,
        options.format,
        options.out,
        with_heads=options.with_heads,
        license=options.license,
        datasets=options.datasets,
        title=options.title,
    )
    print(f"{exported.folder}: {'written' if exported.is_new else 'holds this export already, left as it is'}")
    if options.license is None:
        print(f"licence: {LICENSE_NOT_STATED} in the model card; give it with --license before you pass this on")
    exposure = exposure_of_encoder(exported.folder)
    if exposure is not None and exposure.scans:
        print(f"{EXPOSURE_FILE} names subjects by their cohorts' ids; look whether their terms let you publish it")
    print(f"\nTo load it:\n\n{exported.snippet}", end="")
    return 0


def export_encoder(
    source: str | Path,
    format: Format,
    out: Path,
    *,
    with_heads: bool = False,
    license: str | None = None,
    datasets: Sequence[str] = (),
    title: str | None = None,
) -> Exported:
    """Write the export to the folder `out`, or find that it is there.

    Args:
        source: a run, or what `load_encoder` takes.
        format: layout of the weights.
        out: the folder; its parents are made.
        with_heads: add the projection heads of the run's newest checkpoint; for format teacher.
        license: for the card; None says that it is not stated.
        datasets: for the card's front matter.
        title: of the card; None for the folder's name.

    Raises:
        ValueError: the format cannot hold the encoder, `out` holds something else, or a file is damaged.
        FileNotFoundError: no encoder at `source`.
        OSError: the folder cannot be written.
    """
    run_dir = _run_of(source)
    encoder_source = source if run_dir is None or str(source) != str(run_dir) else run_dir / "encoder"
    encoder = load_encoder(encoder_source)
    check_expressible(encoder, format)
    heads = _heads(run_dir, encoder, source=source, format=format) if with_heads else {}
    out = out.resolve()
    snippet = loading_snippet(encoder, format, out)

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_weights(encoder, format, partial, source=encoder_source, heads=heads)
        read_back = load_encoder(partial / WEIGHTS_FILE[format])
        _check_same(encoder, read_back, format)
        origin = _origin(encoder_source, run_dir)
        if origin.exposure is not None:
            write_exposure(partial / EXPOSURE_FILE, origin.exposure)
        card = write_card(
            encoder,
            origin,
            title=title or out.name,
            format=format,
            digests={path.name: file_digest(path) for path in partial.iterdir()},
            snippet=loading_snippet(encoder, format, Path()),
            read_back=read_back,
            license=license,
            datasets=datasets,
        )
        write_text(partial / CARD_FILE, card)
        is_new = _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, snippet, is_new)


def _run_of(source: str | Path) -> Path | None:
    """The folder of the run that `source` is, or whose encoder it is."""
    path = Path(source)
    for folder in (path, path.parent if path.name == "encoder" else path.parent.parent):
        if (folder / "run.json").is_file() and (folder / "config.yaml").is_file():
            return folder
    return None


def _heads(
    run_dir: Path | None, encoder: VisionTransformer, *, source: str | Path, format: Format
) -> dict[str, torch.Tensor]:
    """The teacher's heads under the names of a teacher file."""
    if format != "teacher":
        raise ValueError(f"--with-heads: format {format} holds no heads; use --format teacher")
    checkpoint = load_newest_checkpoint(run_dir) if run_dir is not None else None
    if checkpoint is None:
        raise ValueError(f"--with-heads: {source} has no checkpoint, where the heads are; give the folder of a run")
    teacher = checkpoint.state["teacher"]
    for name, value in encoder.state_dict().items():
        if not torch.equal(value, teacher[f"encoder.{name}"].float()):
            raise ValueError(
                f"--with-heads: {checkpoint.path} is not the checkpoint of the encoder in {source} ({name!r} differs); "
                "let the run go on to its next checkpoint, which saves both"
            )
    return {key: value.float() for key, value in teacher.items() if key.startswith(TEACHER_HEADS)}


def _write_weights(
    encoder: VisionTransformer, format: Format, folder: Path, *, source: str | Path, heads: dict[str, torch.Tensor]
) -> None:
    path = folder / WEIGHTS_FILE[format]
    match format:
        case "native":
            facts = read_facts(source)
            if facts:  # a copy, which keeps what the file says of its making
                file = find_encoder_file(source)
                shutil.copyfile(file, path)
                shutil.copyfile(file.with_suffix(".json"), path.with_suffix(".json"))
            else:
                save_encoder(encoder, folder, notes=f"from {_name_of(source)}")
        case "teacher":
            state = to_teacher_state(encoder)
            state["teacher"] |= heads
            _save_pickle(state, path)
        case "dinov3":
            _save_pickle(to_dinov3_state(encoder), path)
        case "timm":
            eps = str(encoder.architecture["layer_norm_eps"])
            _save_safetensors(to_timm_state(encoder), path, metadata={EPS_KEY: eps})
        case "hf":
            # transformers refuses a file that does not name the program it is for.
            _save_safetensors(to_hugging_face_state(encoder), path, metadata={"format": "pt"})
            write_json(folder / "config.json", to_hugging_face_config(encoder))


def _save_pickle(state: dict[str, Any], path: Path) -> None:
    # Through a handle: given a path, torch writes that path's (temporary) name into the file.
    with replace_file(path) as temporary, temporary.open("wb") as handle:
        torch.save(state, handle)


def _save_safetensors(state: dict[str, torch.Tensor], path: Path, *, metadata: dict[str, str]) -> None:
    assert len(metadata) == 1, "safetensors writes several in an order that changes from call to call"
    with replace_file(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def _check_same(encoder: VisionTransformer, read_back: VisionTransformer, format: Format) -> None:
    """Compare what was written with what was to be written; their programs compute the RoPE periods themselves."""
    computed = {"mask_token"} | ({"rope_embed.periods"} if format in ("timm", "hf") else set())
    found = read_back.state_dict()
    for name, value in encoder.state_dict().items():
        if name not in computed and not torch.equal(value, found[name]):
            raise OSError(f"{name!r} read back from the export is not what was written; is the disk sound? Try again")
    # What only the native format and configurations state, and the start of training, have no part in the weights.
    stated = {"layer_norm_eps", "layer_scale_init", "rope_base"}
    differing = {
        key: (value, read_back.architecture[key])
        for key, value in encoder.architecture.items()
        if key not in stated and read_back.architecture[key] != value
    }
    assert not differing, f"format {format} was read back as another architecture: {differing}"


def _origin(source: str | Path, run_dir: Path | None) -> Origin:
    facts = read_facts(source)
    record: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if run_dir is not None:
        record = read_json(run_dir / "run.json")
        settings = read_yaml(run_dir / "config.yaml")
    return Origin(
        source=_name_of(run_dir or source),
        notes=facts.get("notes", ""),
        data_fingerprint=facts.get("data_fingerprint", ""),
        versions=json.loads(facts["versions"]) if facts else {},
        recipe=record.get("recipe", ""),
        num_slices=record.get("num_slices"),
        num_excluded=len(record.get("excluded_subjects", {}).get("subjects", ())),
        global_batch=record.get("global_batch"),
        commit=record.get("commit", ""),
        settings=settings,
        exposure=exposure_of_encoder(source),
    )


def _name_of(source: str | Path) -> str:
    """The last part of a path, of no use to a stranger beyond it; an untrained encoder's name as it is."""
    return str(source) if str(source).startswith(UNTRAINED_PREFIX) else Path(source).resolve().name


def _publish(partial: Path, out: Path) -> bool:
    """Give the finished folder its name; False if a folder with the same content has it already."""
    if out.is_dir() and any(out.iterdir()):
        ours, theirs = _contents(partial), _contents(out)
        if ours == theirs:
            return False
        differing = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        more = f" and {len(differing) - _MAX_LISTED} more" if len(differing) > _MAX_LISTED else ""
        raise ValueError(
            f"{out} holds something else (differing: {', '.join(differing[:_MAX_LISTED])}{more}), and nothing is "
            "overwritten; remove it or give another --out"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, and nothing is overwritten; give another --out")
    partial.rename(out)  # an empty folder gives way
    sync(out.parent)
    return True


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_digest(path) for path in files}
