"""``braindino simulate``: a simulated cohort in BIDS, the same bytes for the same seed."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import braindino
from braindino.atomic import write_json, write_text
from braindino.command_line import GOES_ON, command_line
from braindino.lock import lock_folder
from braindino.progress import track
from braindino.records import read_json
from braindino.simulation import bids
from braindino.simulation.anatomy import (
    Template,
    draw_pose,
    interpolate_lattice,
    load_template,
    push_ventricles,
    sample_anatomy,
    template_positions,
    tissue_maps,
)
from braindino.simulation.contrast import draw_image
from braindino.simulation.protocols import PROTOCOLS, Grid, Protocol
from braindino.simulation.subjects import Subject, Visit, draw_subject, visit_generator
from braindino.simulation.tumor import COMPARTMENTS, label_voxels, near_tumor, push_tissue, tumor_fractions
from braindino.volume import save_array

# Raised whenever the same seed gives other bytes, so that no cohort is continued by a program that did not begin it.
SIMULATION_VERSION = 1
# BIDS leaves the folder ``code`` to whoever made the data.
PARAMETERS_PATH = Path("code", "simulation.json")
UNFINISHED_FOLDER = ".unfinished"


@command_line("simulate", interrupted=GOES_ON)
def main(argv: Sequence[str] | None = None) -> int:
    """Write a cohort; 0 when it is all there, 1 with one line on standard error when it cannot be."""
    tyro.cli(_simulate, args=argv, prog="braindino simulate")
    return 0


def simulate_cohort(
    out_dir: str | Path, *, num_subjects: int, seed: int, jobs: int = 2, protocols: Sequence[Protocol] = PROTOCOLS
) -> list[Subject]:
    """Write a simulated cohort, or what is missing of it, and return its subjects.

    Sessions appear whole; files that exist are left alone. Subject k is the same whatever the number of subjects and
    of jobs.

    Args:
        out_dir: BIDS folder; new, empty, or one that was begun with the same parameters.
        num_subjects: at least 1.
        seed: at least 0.
        jobs: sessions that are made at the same time.
        protocols: the sites.

    Raises:
        ValueError: a number out of range; or the folder holds something else, or a cohort with other parameters.
    """
    out_dir = Path(out_dir)
    for name, value, least in (("subjects", num_subjects, 1), ("seed", seed, 0), ("jobs", jobs, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; expected at least {least}")
    _check_folder(out_dir)
    with lock_folder(out_dir):
        _claim(out_dir, parameters(num_subjects=num_subjects, seed=seed, protocols=protocols))
        template = load_template()
        subjects = [
            draw_subject(seed, index, protocols=protocols, tumor_sites=template.tumor_sites)
            for index in track(range(num_subjects), desc="subjects")
        ]
        described = bids.cohort_files(subjects, seed=seed, num_sites=len(protocols), version=braindino.__version__)
        for path, content in described.items():
            _write_missing(out_dir / path, content)

        missing = [
            (index, number)
            for index, subject in enumerate(subjects)
            for number, visit in enumerate(subject.visits)
            if not all((out_dir / path).exists() for path in bids.session_files(subject, visit))
        ]
        shutil.rmtree(out_dir / UNFINISHED_FOLDER, ignore_errors=True)

        def work(place: tuple[int, int]) -> None:
            index, number = place
            subject = subjects[index]
            rng = visit_generator(seed, index, number + 1)
            _write_session(out_dir, subject, subject.visits[number], rng, template)

        # Threads share the template; the heavy steps (interpolation, random numbers, compression) free Python's lock.
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            for _ in track(pool.map(work, missing), total=len(missing), desc="sessions"):
                pass
        shutil.rmtree(out_dir / UNFINISHED_FOLDER, ignore_errors=True)
    return subjects


def parameters(*, num_subjects: int, seed: int, protocols: Sequence[Protocol]) -> dict[str, Any]:
    """All that the bytes of a cohort depend on, as it is kept in the cohort."""
    return {
        "simulation_version": SIMULATION_VERSION,
        "num_subjects": num_subjects,
        "seed": seed,
        "protocols": [{**asdict(protocol), "spacing": list(protocol.spacing)} for protocol in protocols],
    }


def render_session(
    subject: Subject, visit: Visit, rng: np.random.Generator, template: Template
) -> tuple[dict[str, np.ndarray], np.ndarray, Grid]:
    """One visit as arrays indexed (x, y, z), to the right, anterior and superior.

    Returns:
        images: int16 by sequence.
        labels: uint8, all 0 without a tumour.
        grid: where the voxels are.
    """
    grid = Grid(subject.protocol)
    unpushed = template_positions(subject.person, draw_pose(rng))
    positions = push_ventricles(unpushed, subject.person, visit.age, template)
    if visit.tumor is not None:
        positions = push_tissue(positions, visit.tumor)
    tissues = tissue_maps(subject.person, visit.age, template)
    inside, healthy, texture = sample_anatomy(positions, tissues, template, grid)
    fractions = np.concatenate([healthy, np.zeros((len(COMPARTMENTS), len(inside)), dtype=np.float32)])
    if visit.tumor is not None:
        at = np.stack([interpolate_lattice(component, grid.samples).ravel()[inside] for component in unpushed])
        reached = near_tumor(at, visit.tumor)
        csf, _, white, _ = healthy[:, reached]
        ill, irregularity = tumor_fractions(at[:, reached], white, csf, visit.tumor)
        ill *= healthy[:, reached].sum(axis=0)
        share = ill.sum(axis=0)
        fractions[: len(healthy), reached] *= 1 - share
        fractions[len(healthy) :, reached] = ill
        texture[reached] = (1 - share) * texture[reached] + 0.06 * share * irregularity

    def voxels(values: np.ndarray) -> np.ndarray:
        sampled = np.zeros(tuple(len(axis) for axis in grid.samples), dtype=np.float32)
        sampled.ravel()[inside] = values
        return grid.average_slices(sampled)

    brain = voxels(fractions.sum(axis=0)) > 0.5
    in_brain = np.stack([voxels(part)[brain] for part in fractions])
    # A voxel at the edge shows its share of brain only: skull stripping has cut away the rest.
    in_brain /= in_brain.sum(axis=0)
    labels = np.zeros(grid.shape, dtype=np.uint8)
    labels[brain] = label_voxels(in_brain[-len(COMPARTMENTS) :])
    texture_in_brain = voxels(texture)[brain]
    images = {
        sequence: draw_image(rng, sequence, fractions=in_brain, texture=texture_in_brain, brain=brain, grid=grid)
        for sequence in bids.SUFFIXES
    }
    return images, labels, grid


def _simulate(*, out: Path, subjects: int = 16, seed: int = 0, jobs: int = 2) -> None:
    """Write a simulated cohort in BIDS: T1, contrast-enhanced T1, T2 and FLAIR of brains, some with a tumour.

    Started again on the same folder it finishes what is missing.

    Args:
        out: Folder of the cohort.
        subjects: How many people.
        seed: The same seed gives the same bytes.
        jobs: Sessions that are made at the same time.
    """
    people = simulate_cohort(out, num_subjects=subjects, seed=seed, jobs=jobs)
    sessions = sum(len(person.visits) for person in people)
    ill = sum(person.idh is not None for person in people)
    print(f"{out}: SIMULATED cohort of {len(people)} subjects ({ill} with a tumour), {sessions} sessions")


def _check_folder(out_dir: Path) -> None:
    """Refuse a folder that holds anything but a cohort of ours; dot files do not count."""
    if not out_dir.exists() or (out_dir / PARAMETERS_PATH).exists():
        return
    if not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file; expected a folder for the cohort")
    found = sorted(path.name for path in out_dir.iterdir() if not path.name.startswith(".") and path.name != "code")
    if found:
        raise ValueError(
            f"{out_dir} holds {found[0]!r} and no {PARAMETERS_PATH}: not a simulated cohort; choose a new folder"
        )


def _claim(out_dir: Path, wanted: dict[str, Any]) -> None:
    """Keep the parameters in the folder; refuse when other ones are there."""
    path = out_dir / PARAMETERS_PATH
    if not path.exists():
        write_json(path, wanted)
        return
    found = read_json(path)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"{out_dir} holds a cohort simulated with {name} = {found.get(name)}, not {wanted[name]}; "
            f"choose a new folder, or the parameters in {path}"
        )


def _write_missing(path: Path, content: str | dict) -> None:
    if path.exists():
        return
    if isinstance(content, str):
        write_text(path, content)
    else:
        write_json(path, content)


def _write_session(out_dir: Path, subject: Subject, visit: Visit, rng: np.random.Generator, template: Template) -> None:
    """Make a session in a folder aside and move it into place: labels first, so that images imply their labels."""
    images, labels, grid = render_session(subject, visit, rng, template)
    stem = bids.session_stem(subject, visit)
    aside = out_dir / UNFINISHED_FOLDER / stem
    image_folder, label_folder = bids.image_folder(subject, visit), bids.label_folder(subject, visit)
    for sequence, suffix in bids.SUFFIXES.items():
        path = aside / image_folder / f"{stem}_{suffix}.nii.gz"
        save_array(grid.to_storage(images[sequence]), grid.affine, path, dtype=np.int16)
        write_json(path.with_name(f"{stem}_{suffix}.json"), bids.image_sidecar(sequence, subject.protocol))
    folders = [image_folder]
    if visit.tumor is not None:
        path = aside / label_folder / f"{stem}_dseg.nii.gz"
        save_array(grid.to_storage(labels), grid.affine, path, dtype=np.uint8)
        write_json(path.with_name(f"{stem}_dseg.json"), bids.label_sidecar(subject, visit))
        folders.insert(0, label_folder)
    for folder in folders:
        final = out_dir / folder
        final.parent.mkdir(parents=True, exist_ok=True)
        if not final.exists():
            (aside / folder).replace(final)
            continue
        # Some files of the session were lost later: only those come back.
        for path in (aside / folder).iterdir():
            if not (final / path.name).exists():
                path.replace(final / path.name)


if __name__ == "__main__":
    raise SystemExit(main())
