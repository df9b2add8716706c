"""Every task of the table from the published files of its cohort to its numbers, by the commands that a user types.

Each cohort is simulated in miniature: folders, file names, label tables, codes and gaps as published, and scans on a
coarse grid in which a region is the brighter, the more there is of what the task asks for.
"""

import csv
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import pytest

from braindino.downstream import evaluate, extract
from braindino.downstream.task_table import task_names
from braindino.manifest import Scan, read_scans
from braindino.preprocessing import labels, prepare
from braindino.volume import save_array

SHAPE, SPACING_MM = (40, 48, 36), 4.0
# Of the subjects, instead of the tasks' own, which leave too few of these cohorts to score.
TEST_SHARE = "0.4"

Target = str | float | tuple[float, float]


class Expected(NamedTuple):
    """What a task must find in its cohort."""

    metrics: tuple[str, ...]
    """As summary.tsv calls them; the first must beat its baseline."""
    cases: Mapping[Target, Sequence[str]]
    """Target -> ``subject/session`` of each of its cases, with ``/sequence`` where that is the target."""
    left_out: Mapping[str, int]
    """Reason -> scans or sessions."""
    facts: tuple[str, ...] = ()
    """Columns of cases.tsv beside the target."""


class Published(NamedTuple):
    """A cohort in its published layout."""

    write: Callable[[Path], None]
    """Writes its scans and tables below a folder."""
    num_scans: int
    """That are taken."""
    left: Mapping[str, int]
    """Reason code -> files that are left."""
    tasks: Mapping[str, Expected]
    labels_exit: int | None = 0
    """Of `braindino labels`; None where the cohort has no tables."""


class Run(NamedTuple):
    """What is on disk once a cohort's features are there."""

    root: Path
    scans: dict[str, Scan]
    """By scan_id, those that were prepared."""


def write_scan(path: Path, signal: float, *, of: str = "") -> None:
    """A stripped brain in whose right half a ball is brighter by ``signal`` (0 to 1) times 600.

    ``of`` tells apart files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    save_array(brain(of + path.name, signal), np.diag([SPACING_MM] * 3 + [1.0]), path, dtype=np.int16)


def brain(name: str, signal: float) -> np.ndarray:
    """(40, 48, 36) int16 in RAS+; the name decides the noise, so that no two scans are the same."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * SPACING_MM for n in SHAPE], indexing="ij")
    inside = (x / 60) ** 2 + (y / 74) ** 2 + ((z - 4) / 52) ** 2 < 1
    ball = (x - 25) ** 2 + (y - 10) ** 2 + (z - 4) ** 2 < 30**2
    tissue = 300 + y + 40 * rng.random(SHAPE) + 600 * signal * ball
    return np.where(inside, tissue, 0).astype(np.int16)


def write_text(path: Path, lines: Iterable[str], *, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]), encoding=encoding)


def touch(*paths: Path) -> None:
    """Files that are left by their names, so that nobody opens them."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


# ADNI: several visits per subject with one diagnosis, a repeat of the same day, a subject without a row in the table,
# and visit diagnoses in another table, with its code for missing ones and a visit far from any scan.
ADNI_CLASSES = {"CN": 0.0, "MCI": 0.5, "AD": 1.0}
ADNI_VISITS = [
    ("002_S_0295", "CN", "M", "84.8", ["2006-04-18", "2007-05-25"]),
    ("002_S_0413", "CN", "F", "76.4", ["2006-05-02"]),
    ("002_S_0559", "CN", "M", "79.4", ["2006-05-23"]),
    ("007_S_0068", "CN", "F", "74.9", ["2005-09-21"]),
    ("002_S_0729", "MCI", "F", "65.2", ["2006-07-17", "2007-02-07"]),
    ("002_S_0782", "MCI", "M", "81.7", ["2006-08-14"]),
    ("002_S_0954", "MCI", "F", "69.4", ["2006-10-10"]),
    ("011_S_0003", "AD", "M", "81.3", ["2005-09-01", "2006-03-02"]),
    ("011_S_0010", "AD", "F", "73.8", ["2005-11-10"]),
    ("011_S_0053", "AD", "M", "80.2", ["2005-11-18"]),
    ("022_S_0007", "AD", "M", "75.4", ["2005-09-12"]),
]


def write_adni(root: Path) -> None:
    def image(subject: str, description: str, day: str, number: int) -> Path:
        folder = f"ADNI1_Complete_3Yr_1.5T/{subject}/{description}/{day}_08_20_30.0/I{number}"
        return root / folder / f"ADNI_{subject}_MR_{description}_Br_20070319113623975_S13408_I{number}.nii"

    corrected = "GradWarp__B1_Correction__N3__Scaled"
    rows = ['"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format"']
    number = 45108
    for subject, group, sex, age, days in ADNI_VISITS:
        for visit, day in zip(("sc", "m12"), days, strict=False):
            number += 1
            write_scan(image(subject, f"MPR__{corrected}", day, number), ADNI_CLASSES[group])
            year, month, date = day.split("-")
            rows.append(
                f'"I{number}","{subject}","{group}","{sex}","{float(age) + (visit == "m12"):g}","{visit}","MRI",'
                f'"MPR; GradWarp; B1 Correction; N3; Scaled","Processed","{int(month)}/{date}/{year}","NiFTI"'
            )
    write_scan(image("099_S_0001", f"MPR__{corrected}", "2006-01-10", 7), 0.2)
    touch(image("002_S_0295", f"MPR-R__{corrected}", "2006-04-18", 45107))
    touch(image("002_S_0295", "Axial_PD_T2_FSE", "2006-04-18", 8))
    write_text(root / "ADNI1_Complete_3Yr_1.5T_2_08_2024.csv", rows)
    write_text(
        root / "DXSUM_02Aug2024.csv",
        [
            "PHASE,PTID,VISCODE,EXAMDATE,DIAGNOSIS",
            "ADNI1,002_S_0729,bl,2006-07-25,2",
            "ADNI1,002_S_0729,m06,2007-02-20,3",
            "ADNI1,002_S_0413,bl,2006-05-10,-4",
            "ADNI1,022_S_0007,m36,2009-10-01,3",
        ],
    )


def adni(*classes: str) -> dict[Target, list[str]]:
    return {
        group: [f"{subject}/{day}" for subject, of, _, _, days in ADNI_VISITS if of == group for day in days]
        for group in classes
    }


ADNI_FACTS = ("age_years", "sex")
ADNI = Published(
    write_adni,
    num_scans=15,
    left={"repeat": 1, "proton_density": 1},
    labels_exit=3,  # the visit of 2009 is far from the only scan of its subject
    tasks={
        "adni": Expected(
            ("macro_auc", "balanced_accuracy"), adni("CN", "MCI", "AD"), {"no diagnosis": 1}, facts=ADNI_FACTS
        ),
        "adni_cn_ad": Expected(
            ("auc", "balanced_accuracy"),
            adni("CN", "AD"),
            {"no diagnosis": 1, "diagnosis MCI is not part of the task": 4},
            facts=ADNI_FACTS,
        ),
        "adni_cn_mci": Expected(
            ("auc", "balanced_accuracy"),
            adni("CN", "MCI"),
            {"no diagnosis": 1, "diagnosis AD is not part of the task": 5},
            facts=ADNI_FACTS,
        ),
        "knn_adni": Expected(
            ("accuracy", "balanced_accuracy"),
            adni("CN", "AD"),
            {"no diagnosis": 1, "diagnosis MCI is not part of the task": 4},
            facts=ADNI_FACTS,
        ),
    },
)


# UPENN-GBM: number -> days of survival, status, censoring day, signal, sequences of the scan before surgery (_11).
FOUR = ("T1", "T1GD", "T2", "FLAIR")
UPENN = {
    1: ("120", "Deceased", "Not Applicable", 1.0, FOUR),
    2: ("250", "Deceased", "Not Applicable", 0.9, FOUR),
    4: ("365", "Deceased", "Not Applicable", 0.7, FOUR),
    5: ("366", "Deceased", "Not Applicable", 0.3, FOUR),
    7: ("Not Available", "Alive", "1200", 0.0, FOUR),
    8: ("Not Available", "Lost to Follow-up", "100", 0.2, FOUR),
    9: ("Not Available", "Not Available", "Not Available", 0.5, FOUR),
    10: ("Not Available", "Deceased - uncertain date of death", "500", 0.2, FOUR),
    11: ("150", "Deceased", "Not Applicable", 1.0, ("T1", "T1GD", "FLAIR")),
}


def write_upenn(root: Path) -> None:
    folder = root / "images_structural"
    rows = [
        "ID,Gender,Age_at_scan_years,Survival_from_surgery_days_UPDATED,Survival_Status,Survival_Censor,IDH1,MGMT,KPS"
    ]
    for number, (days, status, censored, signal, sequences) in UPENN.items():
        case = f"UPENN-GBM-{number:05d}_11"
        for sequence in sequences:
            write_scan(folder / case / f"{case}_{sequence}.nii.gz", signal)
        gender, age = "FM"[number % 2], 50 + number / 2
        rows.append(f"{case},{gender},{age},{days},{status},{censored},NOS/NEC,Not Available,Not Available")
    later = "UPENN-GBM-00001_21"
    write_scan(folder / later / f"{later}_T1.nii.gz", 0.5)
    rows.append(f"{later},M,50.9,Not Available,Not Available,Not Available,Wildtype,Indeterminate,90")
    write_text(root / "UPENN-GBM_clinical_info_v2.1.csv", rows)
    case = "UPENN-GBM-00001_11"
    touch(
        root / "images_structural_unstripped" / case / f"{case}_T1_unstripped.nii.gz",
        root / "images_segm" / f"{case}_segm.nii.gz",
        root / "images_DTI" / case / f"{case}_DTI_FA.nii.gz",
    )


def upenn(numbers: Iterable[int]) -> list[str]:
    return [f"UPENN-GBM-{number:05d}/11" for number in numbers]


UPENN_GBM = Published(
    write_upenn,
    num_scans=36,
    left={"repeat": 1, "label": 1, "diffusion": 1},
    tasks={
        "os_class": Expected(
            ("auc", "balanced_accuracy"),
            {"1": upenn((1, 2, 4, 11)), "0": upenn((5, 7, 10))},
            # Lost before day 365, nothing known, and the scan after surgery.
            {"no death_within_365_days": 3},
            facts=("age_years",),
        ),
        "os_cox": Expected(
            ("c_index",),
            {
                (120.0, 1.0): upenn([1]),
                (250.0, 1.0): upenn([2]),
                (365.0, 1.0): upenn([4]),
                (366.0, 1.0): upenn([5]),
                (1200.0, 0.0): upenn([7]),
                (100.0, 0.0): upenn([8]),
                (500.0, 0.0): upenn([10]),
            },
            {"no os_days": 1, "a session without T2": 1, "a session without T1c, T2, FLAIR": 1},
            facts=("age_years",),
        ),
        "os_cox_365": Expected(
            ("c_index",),
            {
                (120.0, 1.0): upenn([1]),
                (250.0, 1.0): upenn([2]),
                (365.0, 1.0): upenn([4]),
                (366.0, 0.0): upenn([5]),
                (1200.0, 0.0): upenn([7]),
                (500.0, 0.0): upenn([10]),
            },
            {
                "no os_days": 1,
                "no death_within_365_days": 1,
                "a session without T2": 1,
                "a session without T1c, T2, FLAIR": 1,
            },
            facts=("age_years",),
        ),
    },
)

# ABIDE I and II, five digits of a subject padded to seven; -9999 is no diagnosis, and no age.
ABIDE_SUBJECTS = {
    "NYU/0050952": (1, "8.39"), "NYU/0050953": (1, "9.5"), "NYU/0050954": (1, "-9999"), "NYU/0050955": (1, "10.1"),
    "NYU/0051036": (2, "11.2"), "NYU/0051037": (2, "7.9"), "NYU/0051038": (2, "8.8"), "NYU/0051039": (-9999, "9.0"),
}  # fmt: skip


def write_abide(root: Path) -> None:
    rows = ["SITE_ID,SUB_ID,DX_GROUP,DSM_IV_TR,AGE_AT_SCAN,SEX"]
    for place, (group, age) in ABIDE_SUBJECTS.items():
        site, subject = place.split("/")
        write_scan(root / f"RawData/{place}/session_1/anat_1/mprage.nii.gz", float(group == 1), of=subject)
        rows.append(f"{site},{int(subject)},{group},-9999,{age},1")
    touch(root / "RawData/NYU/0050952/session_1/rest_1/rest.nii.gz")
    write_text(root / "Phenotypic_V1_0b.csv", rows)
    write_scan(root / "ABIDEII-SDSU/28852/session_1/anat_1/anat.nii.gz", 1.0, of="28852")
    write_scan(root / "ABIDEII-SDSU/28853/session_1/anat_1/anat.nii.gz", 0.0, of="28853")
    second = ["SITE_ID,SUB_ID,DX_GROUP,AGE_AT_SCAN ,SEX,CURRENT_MEDICATION"]
    second += ["ABIDEII-SDSU_1,28852,1,13.01,1,Sertralin é", "ABIDEII-SDSU_1,28853,2,12.5,2,"]
    write_text(root / "ABIDEII_Composite_Phenotypic.csv", second, encoding="iso-8859-1")


ABIDE = Published(
    write_abide,
    num_scans=10,
    left={"functional": 1},
    tasks={
        "abide": Expected(
            ("auc", "balanced_accuracy"),
            {
                "ASD": ["0050952/1", "0050953/1", "0050954/1", "0050955/1", "0028852/1"],
                "control": ["0051036/1", "0051037/1", "0051038/1", "0028853/1"],
            },
            {"no diagnosis": 1},
            facts=("age_years", "sex"),
        )
    },
)


# OASIS-1: Analyze pairs whose headers say nothing; an empty CDR, a second visit of one subject, a row without images.
OASIS_SUBJECTS = {1: "0", 2: "0", 3: "0.5", 4: "", 5: "0", 6: "1", 7: "0.5", 8: "0", 9: "2"}


def write_oasis(root: Path) -> None:
    def folder(number: int, visit: str = "MR1") -> Path:
        return root / f"disc1/OAS1_{number:04d}_{visit}"

    rows = ["ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay"]
    for number, cdr in OASIS_SUBJECTS.items():
        case = folder(number).name
        signal = float(cdr not in ("", "0"))
        write_analyze(folder(number) / f"PROCESSED/MPRAGE/SUBJ_111/{case}_mpr_n4_anon_sbj_111.img", signal)
        touched = folder(number) / f"RAW/{case}_mpr-1_anon.img"
        touch(touched, touched.with_suffix(".hdr"))
        rows.append(f"{case},{'FM'[number % 2]},R,{70 + number},,,{29 if cdr else ''},{cdr},1344,0.743,1.306,N/A")
    second = folder(1, "MR2") / "PROCESSED/MPRAGE/SUBJ_111/OAS1_0001_MR2_mpr_n3_anon_sbj_111.img"
    touch(second, second.with_suffix(".hdr"))
    rows.append("OAS1_0001_MR2,M,R,71,,,,,1344,0.743,1.306,40")
    rows.append("OAS1_0099_MR1,F,R,80,2,3,29,1,1344,0.743,1.306,N/A")
    write_text(root / "oasis_cross-sectional-5708aa0a98d82080.csv", rows)


def write_analyze(path: Path, signal: float) -> None:
    """A pair of 256 x 256 x 160 voxels of 1 mm, big-endian: forwards, upwards, to the left."""
    small = brain(path.name, signal)
    fine = np.zeros((160, 256, 256), dtype=np.int16)
    fine[:, 32:-32, 56:-56] = small.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    data = fine[::-1].transpose(1, 2, 0)
    header = bytearray(348)
    struct.pack_into(">i", header, 0, 348)
    struct.pack_into(">5h", header, 40, 4, *data.shape, 1)
    struct.pack_into(">2h", header, 70, 4, 16)
    struct.pack_into(">4f", header, 76, 0, 1, 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".hdr").write_bytes(header)
    path.write_bytes(data.astype(">i2").tobytes(order="F"))


def oasis() -> dict[Target, list[str]]:
    return {
        "0": [f"OAS1_{number:04d}/MR1" for number in (1, 2, 5, 8)],
        "1": [f"OAS1_{number:04d}/MR1" for number in (3, 6, 7, 9)],
    }


OASIS = Published(
    write_oasis,
    num_scans=9,
    left={"repeat": 10},
    tasks={
        "oasis": Expected(("auc", "balanced_accuracy"), oasis(), {"no dementia": 1}, facts=("age_years", "sex")),
        "knn_oasis": Expected(
            ("accuracy", "balanced_accuracy"), oasis(), {"no dementia": 1}, facts=("age_years", "sex")
        ),
    },
)


# PPMI: SWEDD and prodromal participants are neither; the consensus goes before the cohort of enrolment.
PPMI_SUBJECTS = {
    "3102": "Parkinson's Disease", "3105": "Parkinson's Disease", "3107": "Parkinson's Disease",
    "3108": "Parkinson's Disease", "3111": "Parkinson's Disease", "3104": "Healthy Control", "3106": "Healthy Control",
    "3112": "Healthy Control", "3114": "Healthy Control", "3120": "SWEDD", "41412": "Prodromal",
}  # fmt: skip


def write_ppmi(root: Path) -> None:
    def image(subject: str, description: str, day: str) -> Path:
        name = f"PPMI_{subject}_MR_{description}_br_raw_{day}_S1_I9.nii"
        return root / f"PPMI/{subject}/{description}/{day}_10_03_54.0/S139451/{name}"

    rows = ["PATNO,COHORT,COHORT_DEFINITION,CONCOHORT_DEFINITION,ENROLL_AGE"]
    for subject, group in PPMI_SUBJECTS.items():
        write_scan(image(subject, "MPRAGE_GRAPPA", "2011-01-25"), float(group == "Parkinson's Disease"))
        enrolled = "SWEDD" if subject == "3104" else group
        rows.append(f"{subject},1,{enrolled},{group},61.2")
    write_scan(image("3102", "MPRAGE_GRAPPA", "2013-03-05"), 1.0)
    touch(image("3102", "MPRAGE_Repeat", "2011-01-25"), image("3102", "DTI_gated", "2011-01-25"))
    write_text(root / "Participant_Status_12Feb2024.csv", rows)


PPMI = Published(
    write_ppmi,
    num_scans=12,
    left={"repeat": 1, "diffusion": 1},
    tasks={
        "ppmi": Expected(
            ("auc", "balanced_accuracy"),
            {
                "PD": ["3102/2013-03-05", *(f"{n}/2011-01-25" for n in (3102, 3105, 3107, 3108, 3111))],
                "control": [f"{n}/2011-01-25" for n in (3104, 3106, 3112, 3114)],
            },
            {"no diagnosis": 2},
        )
    },
)


# ATLAS R2 (workbook) and R3 (a table per session): 0 and -4 days stand for none, and so does none.
ATLAS_R2 = {"r001s001": 20, "r001s002": 60, "r001s003": 100, "r001s004": 140, "r001s005": 0, "r001s006": 900}
ATLAS_R3 = {"soop0910": "180", "soop0911": "30.5", "soop0912": "-4", "soop0913": "none", "soop0914": "150",
            "soop0915": "5"}  # fmt: skip


def write_atlas(root: Path) -> None:
    def signal(days: float) -> float:
        return min(max(days, 0.0), 900.0) ** 0.5 / 30

    for subject, days in ATLAS_R2.items():
        folder = root / f"ATLAS_2/Training/R001/sub-{subject}/ses-1/anat"
        write_scan(folder / f"sub-{subject}_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz", signal(days))
        touch(folder / f"sub-{subject}_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz")
    touch(root / "ATLAS_2/MNI152NLin2009aSym.nii.gz")
    rows = [
        {"Subject ID": s, "Session": "ses-1", "Days Post Stroke": d, "Chronicity": 180} for s, d in ATLAS_R2.items()
    ]
    pandas.DataFrame(rows).to_excel(root / "ATLAS_2/20220425_ATLAS_2.0_MetaData.xlsx", index=False)
    for subject, text in ATLAS_R3.items():
        session = f"sub-{subject}_ses-1"
        folder = root / f"ATLAS3_Training_Raw/SOOP/sub-{subject}/ses-1/anat"
        days = 0.0 if text == "none" else float(text)
        write_scan(folder / f"{session}_space-orig_desc-brain_T1w.nii.gz", signal(days))
        write_text(
            folder / f"{session}_metadata.csv",
            ["ATLAS2_DATASET,SESSION_ID,DAYS_POST_STROKE,CHRONICITY,SITE", f"Training,{session},{text},180,SOOP"],
        )


ATLAS_DAYS: dict[Target, list[str]] = {
    5.0: ["sub-soop0915/ses-1"], 20.0: ["sub-r001s001/ses-1"], 30.5: ["sub-soop0911/ses-1"],
    60.0: ["sub-r001s002/ses-1"], 100.0: ["sub-r001s003/ses-1"], 140.0: ["sub-r001s004/ses-1"],
    150.0: ["sub-soop0914/ses-1"], 180.0: ["sub-soop0910/ses-1"],
}  # fmt: skip

ATLAS = Published(
    write_atlas,
    num_scans=12,
    left={"label": 6, "derivative": 1},
    tasks={
        "atlas": Expected(
            ("mae (days)", "rmse (days)", "r2"),
            ATLAS_DAYS,
            {"no days_after_stroke": 3, "days_after_stroke outside 0 to 180 days": 1},
        ),
        "atlas_all": Expected(
            ("mae (days)", "rmse (days)", "r2"),
            {**ATLAS_DAYS, 900.0: ["sub-r001s006/ses-1"]},
            {"no days_after_stroke": 3},
        ),
    },
)


# Brain age: IXI with rows of zeros and two people under one number, children of LONG579 at up to three sessions and
# one of them with two scans, Pixar.
IXI_AGES = {2: 35.8, 12: 28.5, 13: 68.2, 14: 54.9, 15: 24.1, 16: 61.5}
PIXAR_AGES = {"pixar001": 4.774811773, "pixar002": 8.2, "pixar155": 39.0}


def write_brain_age(root: Path) -> None:
    def signal(age: float) -> float:
        return age / 80

    for number, age in {**IXI_AGES, 17: 40.0, 219: 40.0}.items():
        write_scan(root / f"IXI-T1/IXI{number:03d}-Guys-0828-T1.nii.gz", signal(age))
    touch(root / "IXI-T2/IXI002-Guys-0828-T2.nii.gz", root / "IXI-PD/IXI002-Guys-0828-PD.nii.gz")
    columns = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE", "STUDY_DATE"]
    rows: list[list[float | None]] = [[number, 2, 164, age, None] for number, age in IXI_AGES.items()]
    rows += [[2, 0, 0, None, None], [17, 1, 182, None, None], [219, 1, 0, 30.5, None], [219, 1, 0, 61.0, None]]
    pandas.DataFrame(rows, columns=columns).to_excel(root / "IXI.xlsx", sheet_name="Table", index=False)

    for subject, age in PIXAR_AGES.items():
        write_scan(root / f"ds000228/sub-{subject}/anat/sub-{subject}_T1w.nii.gz", signal(age))
    lines = [f"sub-{subject}\t{age:.10g}\t4yo\tchild\tM" for subject, age in PIXAR_AGES.items()]
    write_text(root / "ds000228/participants.tsv", ["participant_id\tAge\tAgeGroup\tChild_Adult\tGender", *lines])

    for name, age in (
        ("ses-5_acq-D1S3", 5.7),
        ("ses-7_acq-D1S2", 7.5),
        ("ses-7_acq-D2S9", 7.5),
        ("ses-9_acq-D1S3", 9.4),
    ):
        folder = root / f"ds003604/sub-5003/{name.partition('_')[0]}/anat"
        write_scan(folder / f"sub-5003_{name}_T1w.nii.gz", signal(age))
    write_text(
        root / "ds003604/participants.tsv",
        [
            "participant_id\tsex\tbirthdate\tses-5_date_ST\tses-7_date_ST\tses-9_date_ST",
            "sub-5003\tMale\t1885-03-01\t1890-11-17\t1892-08-31\tn/a",
        ],
    )


AGES: dict[Target, list[str]] = {
    **{age: [f"IXI{number:03d}"] for number, age in IXI_AGES.items()},
    **{age: [f"sub-{subject}"] for subject, age in PIXAR_AGES.items()},
    5.7139: ["sub-5003/ses-5"],
    7.5017: ["sub-5003/ses-7", "sub-5003/ses-7"],
}
# IXI017 has no age, IXI219 two, the child's session at 9 no date.
AGE = Expected(("mae (years)", "rmse (years)", "r2"), AGES, {"no age_years": 3}, facts=("age_years",))
BRAIN_AGE = Published(
    write_brain_age,
    num_scans=15,
    left={"other_sequence": 1, "proton_density": 1},
    labels_exit=3,
    tasks={"brain_age": AGE, "brain_age_release": AGE},
)


# UCSF-PDGM: three digits in the table and four in the folders, a follow-up of a patient, mutations in many spellings.
IDH = {
    4: "wildtype", 5: "wildtype", 7: "wildtype", 8: "wildtype", 9: "wildtype", 10: "mutated (NOS)",
    11: "IDH1 p.R132H", 12: "IDH1 p.R132H", 13: "IDH2 p.R172K", 433: "IDH1 p.R132H",
}  # fmt: skip


def write_ucsf(root: Path) -> None:
    def write_session(name: str, idh: str, sequences: Sequence[str]) -> None:
        folder = root / f"UCSF-PDGM-v5/{name}_nifti"
        for sequence in sequences:
            write_scan(folder / f"{name}_{sequence}.nii.gz", float(idh != "wildtype"))
        touch(folder / f"{name}_T1c_bias.nii.gz", folder / f"{name}_tumor_segmentation.nii.gz")

    rows = ["ID,Sex,Age at MRI,WHO CNS Grade,MGMT status,1p/19q,IDH,1-dead 0-alive,OS,BraTS21 ID"]
    for number, idh in IDH.items():
        write_session(f"UCSF-PDGM-{number:04d}", idh, ("T1c", "FLAIR") if number != 9 else ("T1c",))
        rows.append(f"UCSF-PDGM-{number:03d},M,{50 + number % 20},4,indeterminate,unknown,{idh},1,unknown,")
    write_session("UCSF-PDGM-0433_FU007d", IDH[433], ("T1c", "FLAIR"))
    rows.append(f"UCSF-PDGM-0433_FU007d,F,40,2,positive,intact,{IDH[433]},0,,")
    write_session("UCSF-PDGM-0500", "wildtype", ("T1c", "FLAIR"))  # not in the table
    write_text(root / "UCSF-PDGM-metadata_v5.csv", rows)


UCSF_PDGM = Published(
    write_ucsf,
    num_scans=23,
    left={"repeat": 12, "label": 12},
    tasks={
        "idh": Expected(
            ("auc", "balanced_accuracy"),
            {
                "wildtype": [f"UCSF-PDGM-{number:04d}" for number in (4, 5, 7, 8)],
                "non-wildtype": [
                    *(f"UCSF-PDGM-{number:04d}" for number in (10, 11, 12, 13, 433)),
                    "UCSF-PDGM-0433/FU007d",
                ],
            },
            {"no idh": 1, "a session without FLAIR": 1},
            facts=("age_years", "sex"),
        )
    },
)


# BraTS 2023 MEN, PED and SSA: the four sequences of a case, one case with a second visit.
BRATS_TOPS = {
    "MEN": "BraTS2023-MEN",
    "PED": "ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData",
    "SSA": "ASNR-MICCAI-BraTS2023-SSA-Challenge-TrainingData_V2",
}
BRATS_CASES = ("MEN-00004-000", "MEN-00004-001", "MEN-00005-000", "PED-00002-000", "PED-00003-000", "SSA-00002-000")
BRATS_SUFFIXES = {"t1n": "T1", "t1c": "T1c", "t2w": "T2", "t2f": "FLAIR"}


def write_brats(root: Path) -> None:
    for case in BRATS_CASES:
        name = f"BraTS-{case}"
        folder = root / BRATS_TOPS[case[:3]] / name
        for number, suffix in enumerate(BRATS_SUFFIXES):
            write_scan(folder / f"{name}-{suffix}.nii.gz", number / 3)
        touch(folder / f"{name}-seg.nii.gz")


def sequences() -> dict[Target, list[str]]:
    return {
        sequence: [f"BraTS-{case[:-4]}/{case[-3:]}/{sequence}" for case in BRATS_CASES]
        for sequence in BRATS_SUFFIXES.values()
    }


BRATS_SEQUENCE = Published(
    write_brats,
    num_scans=24,
    left={"label": 6},
    labels_exit=None,
    tasks={
        "sequence": Expected(("accuracy", "macro_auc"), sequences(), {}),
        "knn_sequence": Expected(("accuracy",), sequences(), {}),
    },
)

COHORTS = {
    "adni": ADNI,
    "upenn-gbm": UPENN_GBM,
    "abide": ABIDE,
    "oasis-1": OASIS,
    "ppmi": PPMI,
    "atlas": ATLAS,
    "brain-age": BRAIN_AGE,
    "ucsf-pdgm": UCSF_PDGM,
    "brats-sequence": BRATS_SEQUENCE,
}
IN_THE_SUITE = ("adni",)


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    """Cohorts that are on disk already; each is prepared once for all its tasks."""
    return {}


def make_run(name: str, root: Path) -> Run:
    """A cohort, prepared, with its tidy table and its features."""
    published = COHORTS[name]
    published.write(root / "data")
    data, prepared = str(root / "data"), str(root / "prepared")
    assert prepare.main(["--cohort", name, data, "--out", prepared, "--jobs", "0"]) == 0
    scans = read_scans(root / "prepared" / "scans.tsv")
    done = {scan.scan_id: scan for scan in scans if scan.status == "done"}
    left = Counter(scan.reason.partition(":")[0] for scan in scans if scan.status != "done")
    assert (len(done), left) == (published.num_scans, published.left)
    if published.labels_exit is not None:
        table = ["--out", str(root / "labels.tsv"), "--scans", str(root / "prepared" / "scans.tsv")]
        assert labels.main(["--cohort", name, data, *table]) == published.labels_exit
    arguments = ["--prepared", prepared, "--out", str(root / "features"), "--device", "cpu"]
    assert extract.main([*arguments, "--encoder", "intensity", "--options", "num_slices=4"]) == 0
    return Run(root, done)


@pytest.mark.parametrize(
    ("cohort", "task"),
    [
        pytest.param(name, task, id=task, marks=() if name in IN_THE_SUITE else pytest.mark.slow)
        for name, published in COHORTS.items()
        for task in published.tasks
    ],
)
def test_a_task_finds_in_the_published_files_the_cases_it_should_and_what_was_planted_in_them(
    runs, tmp_path_factory, cohort, task
):
    if cohort not in runs:
        runs[cohort] = make_run(cohort, tmp_path_factory.mktemp(cohort))
    run, expected = runs[cohort], COHORTS[cohort].tasks[task]
    table = run.root / "labels.tsv"
    arguments = [task, "--features", str(run.root / "features"), "--out", str(run.root / "eval"), "--device", "cpu"]
    arguments += ["--ratios", "1.0", "--seeds", "0", "--permutations", "0", "--test-fraction", TEST_SHARE]
    assert evaluate.main([*arguments, *(["--labels", str(table)] if table.exists() else [])]) == 0

    folder = run.root / "eval" / task
    cases = read(folder / "cases.tsv")
    assert tuple(cases[0]) == ("case", "subject", "scans", *target_columns(expected), *expected.facts)
    found = sorted((target_of(row, expected), name_of(row, run.scans, expected)) for row in cases)
    assert found == sorted((target, name) for target, names in expected.cases.items() for name in names)
    # A code of a missing value is neither an age nor a sex.
    facts = [row[name] for row in cases for name in expected.facts]
    assert all(fact in ("", "M", "F") or 0 < float(fact) < 100 for fact in facts)
    about = json.loads((folder / "run.json").read_text())
    assert about["left_out"] == expected.left_out

    everybody = {row["subject"] for row in cases}
    for split in json.loads((folder / "splits.json").read_text())["splits"]:
        assert not set(split["train"]) & set(split["test"])
        assert set(split["train"]) | set(split["test"]) == everybody

    rows = read(folder / "summary.tsv")
    assert tuple(dict.fromkeys(row["metric"] for row in rows)) == expected.metrics
    # Of neighbourhoods the nearest neighbour.
    first = rows[0]
    estimate, baseline = float(first["estimate"]), float(first["baseline"])
    assert estimate < 0.7 * baseline if first["metric"].startswith("mae") else estimate > baseline + 0.2


def test_every_task_of_the_table_is_run_on_its_cohort():
    assert sorted(task for published in COHORTS.values() for task in published.tasks) == task_names()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def target_columns(expected: Expected) -> tuple[str, ...]:
    return ("time", "event") if isinstance(next(iter(expected.cases)), tuple) else ("target",)


def target_of(row: Mapping[str, str], expected: Expected) -> Target:
    kind = next(iter(expected.cases))
    if isinstance(kind, tuple):
        return float(row["time"]), float(row["event"])
    return float(row["target"]) if isinstance(kind, float) else row["target"]


def name_of(row: Mapping[str, str], scans: Mapping[str, Scan], expected: Expected) -> str:
    scan = scans[row["scans"].split()[0]]
    sequence = scan.sequence if scan.sequence in expected.cases else ""
    return "/".join(filter(None, (scan.subject, scan.session, sequence)))
