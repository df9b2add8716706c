"""The BIDS side of a simulated cohort: file names, tables, sidecars and the words that say it is simulated."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from braindino.manifest import SEQUENCES
from braindino.simulation.protocols import Protocol
from braindino.simulation.subjects import Subject, Visit

BIDS_VERSION = "1.10.0"
SUFFIXES = {"T1": "T1w", "T1c": "ce-gadolinium_T1w", "T2": "T2w", "FLAIR": "FLAIR"}
assert tuple(SUFFIXES) == SEQUENCES
# Repetition, echo and inversion time in seconds, as typical of such protocols; nothing is computed from them.
TIMES = {"T1": (1.9, 0.0026, 0.9), "T1c": (1.9, 0.0026, 0.9), "T2": (4.0, 0.09, None), "FLAIR": (9.0, 0.09, 2.5)}
SAID = "SIMULATED: made by `braindino simulate`, not measured on anybody. Nothing medical can be learned from it."

PARTICIPANT_COLUMNS: dict[str, dict[str, Any]] = {
    "participant_id": {"Description": "Subject; every number in this table is simulated."},
    "age": {
        "Description": "Age at the first visit; ages at each visit are in sub-*/sub-*_sessions.tsv.",
        "Units": "years",
    },
    "sex": {"Description": "Sex; acts on head size.", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Simulated site, one protocol each: grid, storage orientation, intensity scale and noise."},
    "tumor": {"Description": "Whether there is a glioma.", "Levels": {"0": "no", "1": "yes"}},
    "idh": {
        "Description": "Mutation of the IDH gene; acts on necrosis and enhancement. n/a without a tumour.",
        "Levels": {"mutant": "mutated: less necrosis and enhancement", "wildtype": "not mutated"},
    },
    "survival_days": {
        "Description": "Time from the first visit to death or last contact, drawn from a Weibull law whose risk grows "
        "with age and the share of necrosis. n/a without a tumour.",
        "Units": "days",
    },
    "event": {
        "Description": "How survival_days ends. n/a without a tumour.",
        "Levels": {"0": "censored: alive at the last contact", "1": "death"},
    },
}
SESSION_COLUMNS: dict[str, dict[str, Any]] = {
    "session_id": {"Description": "Visit."},
    "age": {"Description": "Age at this visit.", "Units": "years"},
}
LABEL_TABLE = "index\tname\tabbreviation\n1\tnecrotic core\tNCR\n2\toedema\tED\n3\tenhancing tumour\tET\n"

README = """SIMULATED cohort
================

{said}

`braindino simulate` bent the MNI152 brain template into one shape per subject, aged it, put a glioma into some
subjects, and rendered T1w, contrast-enhanced T1w (ce-gadolinium), T2w and FLAIR images as {num_sites} invented sites
would store them. Images hold the brain only (already skull-stripped); voxels outside it are 0.
Seed {seed}, {num_subjects} subjects.

- participants.tsv: age, sex, site, tumour, IDH status, survival; participants.json explains the columns.
- sub-*/sub-*_sessions.tsv: age at each visit.
- derivatives/tumor: labels of the tumours (1 necrotic core, 2 oedema, 3 enhancing) on the grid of the session's images.

The template is the ICBM 2009a nonlinear symmetric average (copyright 1993-2004 Louis Collins, McConnell Brain Imaging
Centre, Montreal Neurological Institute, McGill University), as shipped with nilearn.
"""


def session_stem(subject: Subject, visit: Visit) -> str:
    """What all file names of a session start with."""
    return f"{subject.name}_{visit.name}"


def image_folder(subject: Subject, visit: Visit) -> Path:
    """Folder of a session's images, relative to the cohort."""
    return Path(subject.name, visit.name, "anat")


def label_folder(subject: Subject, visit: Visit) -> Path:
    """Folder of a session's tumour labels, relative to the cohort."""
    return Path("derivatives", "tumor", subject.name, visit.name, "anat")


def session_files(subject: Subject, visit: Visit) -> list[Path]:
    """Every file of a session, relative to the cohort, labels first."""
    stem = session_stem(subject, visit)
    names = [image_folder(subject, visit) / f"{stem}_{suffix}" for suffix in SUFFIXES.values()]
    if visit.tumor is not None:
        names.insert(0, label_folder(subject, visit) / f"{stem}_dseg")
    return [name.with_name(name.name + ending) for name in names for ending in (".nii.gz", ".json")]


def cohort_files(subjects: Sequence[Subject], *, seed: int, num_sites: int, version: str) -> dict[Path, str | dict]:
    """Texts and JSON values of the files that describe the cohort, by path relative to it."""
    generated = [{"Name": "braindino simulate", "Version": version, "Description": SAID}]
    name = f"SIMULATED brain MRI, {len(subjects)} subjects, seed {seed}"
    description = {"Name": name, "BIDSVersion": BIDS_VERSION, "DatasetType": "raw", "GeneratedBy": generated}
    labels = {**description, "Name": f"{name}: tumour labels", "DatasetType": "derivative"}
    files: dict[Path, str | dict] = {
        Path("dataset_description.json"): description,
        Path("README"): README.format(said=SAID, num_sites=num_sites, seed=seed, num_subjects=len(subjects)),
        Path("participants.json"): PARTICIPANT_COLUMNS,
        Path("participants.tsv"): _table(PARTICIPANT_COLUMNS, map(_participant, subjects)),
        Path("derivatives", "tumor", "dataset_description.json"): labels,
        Path("derivatives", "tumor", "dseg.tsv"): LABEL_TABLE,
    }
    for subject in subjects:
        rows = ((visit.name, f"{visit.age:.1f}") for visit in subject.visits)
        files[Path(subject.name, f"{subject.name}_sessions.tsv")] = _table(SESSION_COLUMNS, rows)
        files[Path(subject.name, f"{subject.name}_sessions.json")] = SESSION_COLUMNS
    return files


def image_sidecar(sequence: str, protocol: Protocol) -> dict[str, Any]:
    """What the JSON file beside an image says; times in seconds, distances in mm."""
    repetition, echo, inversion = TIMES[sequence]
    sidecar: dict[str, Any] = {
        "Description": SAID,
        "Simulated": True,
        "SkullStripped": True,
        "Modality": "MR",
        "Manufacturer": "simulated",
        "InstitutionName": f"simulated site {protocol.site}",
        "MagneticFieldStrength": protocol.field_strength,
        "RepetitionTime": repetition,
        "EchoTime": echo,
        "SliceThickness": protocol.thickness,
        "SpacingBetweenSlices": protocol.spacing[2],
    }
    if inversion is not None:
        sidecar["InversionTime"] = inversion
    if sequence == "T1c":
        sidecar["ContrastBolusIngredient"] = "GADOLINIUM"
    return sidecar


def label_sidecar(subject: Subject, visit: Visit) -> dict[str, Any]:
    """What the JSON file beside a label map says."""
    stem, folder = session_stem(subject, visit), image_folder(subject, visit)
    return {
        "Description": f"{SAID} 1 necrotic core, 2 oedema, 3 enhancing tumour.",
        "Simulated": True,
        "Manual": False,
        "SpatialReference": "orig",
        "Sources": [f"bids::{(folder / f'{stem}_{suffix}.nii.gz').as_posix()}" for suffix in SUFFIXES.values()],
    }


def _participant(subject: Subject) -> tuple[str, ...]:
    row = (subject.idh, subject.survival_days, subject.event)
    return (
        subject.name,
        f"{subject.age:.1f}",
        subject.sex,
        subject.protocol.site,
        str(int(subject.idh is not None)),
        *("n/a" if value is None else str(value) for value in row),
    )


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in (tuple(columns), *rows))
