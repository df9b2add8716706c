"""Published label tables in miniature: their column names, codes, units and encodings come out as one tidy table."""

import csv
from pathlib import Path

import pandas
import pytest

from braindino.label_table import labels_of
from braindino.label_table import read_labels as read_for_heads
from braindino.manifest import Scan, write_scans
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.labels import main, read_labels


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("|", "\t"), encoding=encoding)
    return str(path)


def tidy(path: Path, *sources: object, cohort: str, exit_code: int = 0, extra: tuple[str, ...] = ()) -> list[list[str]]:
    """Rows of the tidy table without its header and first column."""
    out = path / "labels.tsv"
    assert main(["--cohort", cohort, "--out", str(out), *extra, *map(str, sources)]) == exit_code
    with out.open(newline="", encoding="utf-8") as handle:
        header, *rows = csv.reader(handle, delimiter="\t")
    assert header[:3] == ["cohort", "subject", "session"]
    assert {row[0] for row in rows} <= {cohort}
    return [header[3:], *[row[1:] for row in rows]]


# Row -> the published table's name, its text, and what the tidy table says.
TABLES = {
    "abide": (
        "Phenotypic_V1_0b.csv",
        "SITE_ID,SUB_ID,DX_GROUP,DSM_IV_TR,AGE_AT_SCAN,SEX\nNYU,50952,1,1,8.39,1\nNYU,51036,2,0,-9999,2\n",
        [
            ["diagnosis", "age_years", "sex", "site"],
            ["0050952", "", "ASD", "8.39", "M", "NYU"],
            ["0051036", "", "control", "n/a", "F", "NYU"],
        ],
    ),
    "adni": (
        "ADNI1_Complete_3Yr_1.5T_2_08_2024.csv",
        '"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format"\n'
        '"I45108","002_S_0295","CN","M","85","sc","MRI","MPR; GradWarp","Processed","4/18/2006","NiFTI"\n'
        '"I118671","002_S_0295","CN","M","85","sc","MRI","MPR; GradWarp; 2","Processed","4/18/2006","NiFTI"\n'
        '"I40966","011_s_0003","AD","F","81","m06","MRI","MPR-R","Processed","11/02/2006","NiFTI"\n',
        [
            ["diagnosis", "age_years", "sex", "visit", "visit_diagnosis"],
            ["002_S_0295", "2006-04-18", "CN", "85", "M", "sc", "n/a"],
            ["011_S_0003", "2006-11-02", "AD", "81", "F", "m06", "n/a"],
        ],
    ),
    "oasis-1": (
        "oasis_cross-sectional-5708aa0a98d82080.csv",
        "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay\n"
        "OAS1_0001_MR1,F,R,74,2,3,29,0,1344,0.743,1.306,N/A\n"
        "OAS1_0003_MR1,F,R,73,4,3,27,0.5,1454,0.708,1.207,N/A\n"
        "OAS1_0004_MR1,M,R,28,,,,,1588,0.803,1.105,N/A\n",
        [
            ["dementia", "cdr", "age_years", "sex", "mmse"],
            ["OAS1_0001", "MR1", "0", "0", "74", "F", "29"],
            ["OAS1_0003", "MR1", "1", "0.5", "73", "F", "27"],
            ["OAS1_0004", "MR1", "n/a", "n/a", "28", "M", "n/a"],
        ],
    ),
    "pixar": (
        "participants.tsv",
        "participant_id|Age|AgeGroup|Child_Adult|Gender\nsub-pixar001|4.774811773|4yo|child|M\nsub-pixar155|39|Adult|adult|F\n",
        [
            ["age_years", "age_group", "sex"],
            ["sub-pixar001", "", "4.774811773", "4yo", "M"],
            ["sub-pixar155", "", "39", "Adult", "F"],
        ],
    ),
    "piop2": (
        "participants.tsv",
        "participant_id|age|sex|BMI\nsub-0001|22.25|male|21\nsub-0002|n/a|n/a|n/a\n",
        [["age_years", "sex"], ["sub-0001", "", "22.25", "M"], ["sub-0002", "", "n/a", "n/a"]],
    ),
    "id1000": (
        "participants.tsv",
        "participant_id|age|sex\nsub-0001|22|female\n",
        [["age_years", "sex"], ["sub-0001", "", "22", "F"]],
    ),
    # One line per child becomes one per session; ages from shifted dates: 2,087, 2,740 and no days.
    "long579": (
        "participants.tsv",
        "participant_id|sex|birthdate|ses-5_date_ST|ses-7_date_ST|ses-9_date_ST\n"
        "sub-5003|Male|1885-03-01|1890-11-17|1892-08-31|n/a\n",
        [
            ["age_years", "sex"],
            ["sub-5003", "ses-5", "5.7139", "M"],
            ["sub-5003", "ses-7", "7.5017", "M"],
            ["sub-5003", "ses-9", "n/a", "M"],
        ],
    ),
    "ppmi": (
        "Participant_Status_12Feb2024.csv",
        "PATNO,COHORT,COHORT_DEFINITION,ENROLL_AGE\n"
        "3102,1,Parkinson's Disease,61.2\n3104,2,Healthy Control,55\n3120,3,SWEDD,70\n41412,4,Prodromal,66\n",
        [
            ["diagnosis", "enrollment_age_years"],
            ["3102", "", "PD", "61.2"],
            ["3104", "", "control", "55"],
            ["3120", "", "n/a", "70"],
            ["41412", "", "n/a", "66"],
        ],
    ),
    "icbm": (
        "IDA_ICBM_1_02_2024.csv",
        "Subject,Sex,Age,Acq Date\nMNI_0001,M,31,5/01/2000\n",
        [["age_years", "sex"], ["MNI_0001", "2000-05-01", "31", "M"]],
    ),
    "atlas": (
        "sub-soop0910_ses-1_metadata.csv",
        "ATLAS2_DATASET,SESSION_ID,DAYS_POST_STROKE,CHRONICITY,SITE\nTraining,sub-soop0910_ses-1,182.5,180,SOOP\n",
        [
            ["days_after_stroke", "chronicity", "site"],
            ["sub-soop0910", "ses-1", "182.5", "180", "SOOP"],
        ],
    ),
    # Dead by day 365; later; alive and followed for longer; lost before; dead on an unknown day.
    "upenn-gbm": (
        "UPENN-GBM_clinical_info_v2.1.csv",
        "ID,Gender,Age_at_scan_years,Survival_from_surgery_days_UPDATED,Survival_Status,Survival_Censor,IDH1,MGMT,KPS\n"
        "UPENN-GBM-00001_11,F,50.1,365,Deceased,Not Applicable,Wildtype,Methylated,90\n"
        "UPENN-GBM-00002_11,M,63.98,366,Deceased,Not Applicable,NOS/NEC,Not Available,Not Available\n"
        "UPENN-GBM-00003_11,M,70,Not Available,Alive,1200,Mutated,Indeterminate,80\n"
        "UPENN-GBM-00004_11,F,41,Not Available,Lost to Follow-up,100,Wildtype,Unmethylated,100\n"
        "UPENN-GBM-00005_11,F,41,Not Available,Deceased - uncertain date,90,Wildtype,Unmethylated,100\n",
        [
            ["os_days", "death", "death_within_365_days", "age_years", "sex", "idh", "mgmt", "karnofsky"],
            ["UPENN-GBM-00001", "11", "365", "1", "1", "50.1", "F", "wildtype", "methylated", "90"],
            ["UPENN-GBM-00002", "11", "366", "1", "0", "63.98", "M", "n/a", "n/a", "n/a"],
            ["UPENN-GBM-00003", "11", "1200", "0", "0", "70", "M", "mutated", "n/a", "80"],
            ["UPENN-GBM-00004", "11", "100", "0", "n/a", "41", "F", "wildtype", "unmethylated", "100"],
            ["UPENN-GBM-00005", "11", "90", "0", "n/a", "41", "F", "wildtype", "unmethylated", "100"],
        ],
    ),
    "ucsf-pdgm": (
        "UCSF-PDGM-metadata_v5.csv",
        "ID,Sex,Age at MRI,WHO CNS Grade,MGMT status,1p/19q,IDH,1-dead 0-alive,OS,BraTS21 ID\n"
        "UCSF-PDGM-004,M,66,4,negative,unknown,wildtype,1,1303,BraTS2021_00097\n"
        "UCSF-PDGM-0433_FU007d,F,40,2,positive,intact,IDH1 p.R132H,0,,\n"
        "UCSF-PDGM-010,F,40,2,indeterminate,intact,mutated (NOS),0,200,\n",
        [
            ["idh", "idh_variant", "mgmt", "codeletion_1p19q", "grade", "os_days", "death", "age_years", "sex"],
            ["UCSF-PDGM-0004", "", "wildtype", "wildtype", "unmethylated", "n/a", "4", "1303", "1", "66", "M"],
            ["UCSF-PDGM-0010", "", "non-wildtype", "mutated (NOS)", "n/a", "intact", "2", "200", "0", "40", "F"],
            ["UCSF-PDGM-0433", "FU007d", "non-wildtype", "IDH1 p.R132H", "methylated", "intact", "2", "n/a", "0",
             "40", "F"],
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("cohort", sorted(TABLES))
def test_a_published_table_becomes_tidy(tmp_path, cohort):
    name, text, expected = TABLES[cohort]
    write(tmp_path / "data/phenotypes" / name, text)
    write(tmp_path / "data/derivatives" / name, "a copy that must not be read\n")
    assert tidy(tmp_path, tmp_path / "data", cohort=cohort) == expected


def test_every_row_with_label_tables_is_tried_here():
    from braindino.preprocessing.cohort_table import list_cohorts

    ours = {row.name for row in list_cohorts() if row.labels and row.reader in ("bids", "template", "loni")}
    assert ours == {*TABLES, "ixi", "piop1"}


def test_the_tidy_table_reaches_the_scans_of_the_heads(tmp_path):
    name, text, _ = TABLES["upenn-gbm"]
    scans = [
        Scan("/d/a_T1.nii.gz", "upenn-gbm", "UPENN-GBM-00001", "11", "T1"),
        Scan("/d/b_T1.nii.gz", "upenn-gbm", "UPENN-GBM-00004", "11", "T1"),
        Scan("/d/c_T1.nii.gz", "upenn-gbm", "UPENN-GBM-00099", "11", "T1"),
    ]
    tidy(tmp_path, write(tmp_path / name, text), cohort="upenn-gbm")
    labels = labels_of(scans, read_for_heads([tmp_path / "labels.tsv"], "death_within_365_days"))
    assert {scan_id: label.text for scan_id, label in labels.items()} == {scans[0].scan_id: "1"}
    days = labels_of(scans, read_for_heads([tmp_path / "labels.tsv"], "os_days"))
    assert [days[scan.scan_id].text for scan in scans[:2]] == ["365", "100"]


def test_labels_of_sessions_follow_their_children(tmp_path):
    name, text, _ = TABLES["long579"]
    tidy(tmp_path, write(tmp_path / name, text), cohort="long579")
    scans = [Scan(f"/d/{visit}.nii", "long579", "sub-5003", visit, "T1") for visit in ("ses-5", "ses-7", "ses-9")]
    ages = labels_of(scans, read_for_heads([tmp_path / "labels.tsv"], "age_years"))
    assert [ages[scan.scan_id].text if scan.scan_id in ages else None for scan in scans] == ["5.7139", "7.5017", None]


def test_ixi_comes_from_its_workbook_with_doubled_numbers_and_zeros(tmp_path, capsys):
    columns = ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE", "STUDY_DATE"]
    rows = [
        [2, 2, 164, 35.800137, pandas.Timestamp("2005-11-25")],
        [13, 1, 182, None, None],
        [35, 2, 0, 45.2, None],
        [35, 0, 0, None, None],  # a row of zeros beside the full one
        [219, 1, 0, 30.5, None],
        [219, 1, 0, 61.0, None],  # two people under one number
        [None, None, None, None, None],
        ["unknown", 1, 0, 50.0, None],
    ]
    with pandas.ExcelWriter(tmp_path / "IXI.xlsx") as workbook:
        pandas.DataFrame({"ID": [1], "ETHNIC": ["White"]}).to_excel(workbook, sheet_name="Ethnicity", index=False)
        pandas.DataFrame(rows, columns=columns).to_excel(workbook, sheet_name="Table", index=False)
    assert tidy(tmp_path, tmp_path / "IXI.xlsx", cohort="ixi", exit_code=3) == [
        ["age_years", "sex"],
        ["IXI002", "", "35.800137", "F"],
        ["IXI013", "", "n/a", "M"],
        ["IXI035", "", "45.2", "F"],
        ["IXI219", "", "n/a", "M"],
    ]
    told = capsys.readouterr().out
    assert "not used, age_years: rows contradict each other: 2 (" in told
    assert "IXI.xlsx, line 6; " in told and "IXI.xlsx, line 7)" in told
    assert "nobody that the row names (IXI_ID: found 'unknown'; expected '\\\\d{1,3}'): 1 (" in told
    assert "age_years: 2 known, 2 missing" in told


def test_a_table_in_latin_1_and_a_second_release_are_read_as_declared(tmp_path):
    write(tmp_path / "Phenotypic_V1_0b.csv", TABLES["abide"][1])
    text = "SITE_ID,SUB_ID,DX_GROUP,AGE_AT_SCAN ,SEX,CURRENT_MEDICATION\nABIDEII-SDSU_1,28852,1,13.01,1,Sertralin é\n"
    write(tmp_path / "ABIDEII_Composite_Phenotypic.csv", text, encoding="iso-8859-1")
    assert tidy(tmp_path, tmp_path, cohort="abide")[1] == ["0028852", "", "ASD", "13.01", "M", "ABIDEII-SDSU_1"]
    with pytest.raises(
        ValueError, match=r"Phenotypic_V1_0b.csv: is not utf-8-sig .*set 'encoding' in the cohort's row"
    ):
        path = write(tmp_path / "x/Phenotypic_V1_0b.csv", text, encoding="iso-8859-1")
        read_labels(load_cohort("abide"), [path])


def test_a_diagnosis_is_joined_to_the_scan_nearest_in_time(tmp_path, capsys):
    write(tmp_path / TABLES["adni"][0], TABLES["adni"][1])
    write(
        tmp_path / "DXSUM_01Jan2024.csv",
        "PTID,VISCODE,EXAMDATE,DIAGNOSIS\n002_S_0295,bl,2006-05-18,1\n002_S_0295,m12,2006-01-18,2\n"
        "011_S_0003,bl,2005-10-01,3\n011_S_0003,m36,2009-10-01,3\n",
    )
    rows = tidy(tmp_path, tmp_path, cohort="adni", exit_code=3)
    # 30 days after the scan goes before 90 days before it; more than 180 days away is nobody's.
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [
        ("002_S_0295", "2006-04-18", "CN"),
        ("011_S_0003", "2006-11-02", "n/a"),
    ]
    assert "no known session within 180 days: 1 (" in capsys.readouterr().out


def test_scans_tell_sessions_and_how_many_of_them_the_labels_reach(tmp_path, capsys):
    write(tmp_path / "DXSUM.csv", "PTID,EXAMDATE,DIAGNOSIS\n002_S_0295,5/18/2006,1\n")
    scans = [
        Scan("/d/a.nii", "adni", "002_S_0295", "2006-04-18", "T1"),
        Scan("/d/b.nii", "adni", "099_S_0001", "2006-04-18", "T1"),
    ]
    write_scans(tmp_path / "scans.tsv", scans)
    extra = ("--scans", str(tmp_path / "scans.tsv"))
    rows = tidy(tmp_path, tmp_path / "DXSUM.csv", cohort="adni", extra=extra)
    assert [(row[0], row[1], row[-1]) for row in rows[1:]] == [("002_S_0295", "2006-04-18", "CN")]
    assert (
        "1 of 2 prepared scans have a row; without one: 1 subjects, such as adni/099_S_0001" in capsys.readouterr().out
    )


def test_tables_of_the_parts_go_to_their_parts(tmp_path):
    write(tmp_path / "ds000228/participants.tsv", TABLES["pixar"][1])
    write(tmp_path / "ds003604/participants.tsv", TABLES["long579"][1])
    labels = read_labels(load_cohort("brain-age"), [str(tmp_path)])
    assert sorted({(key.cohort, key.subject) for key in labels.rows}) == [
        ("long579", "sub-5003"),
        ("pixar", "sub-pixar001"),
        ("pixar", "sub-pixar155"),
    ]
    for name, age in (("PIOP1", "20"), ("PIOP2", "30")):
        write(tmp_path / f"aomic/{name}/participants.tsv", f"participant_id|age|sex\nsub-0001|{age}|male\n")
    labels = read_labels(load_cohort("piop"), [str(tmp_path / "aomic")])
    assert {key.cohort: cells["age_years"].text for key, cells in labels.rows.items()} == {"piop1": "20", "piop2": "30"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "participant_id|Years\nsub-pixar001|4\n",
            r"participants.tsv: column 'Age' is missing; found \['participant_id'",
        ),
        ("participant_id|Age|Age\nsub-pixar001|4|5\n", r"columns \['Age'\] stand twice"),
        (
            "participant_id|Age\nsub-pixar001|4\nsub-pixar001|5\n",
            r"participants.tsv, line 3: age_years '5' of subject sub-pixar001 contradicts '4' in .*, line 2",
        ),
    ],
)
def test_a_table_that_cannot_be_right_is_an_error_with_its_place(tmp_path, text, message):
    path = write(tmp_path / "participants.tsv", text)
    with pytest.raises(ValueError, match=message):
        read_labels(load_cohort("pixar"), [path])


def test_a_cell_that_is_no_value_is_told_and_missing(tmp_path, capsys):
    path = write(tmp_path / "participants.tsv", "participant_id|Age|Gender\nsub-pixar001|four|x\nsub-pixar002|5.0|F\n")
    assert tidy(tmp_path, path, cohort="pixar", exit_code=3)[1:] == [
        ["sub-pixar001", "", "n/a", "n/a", "n/a"],
        ["sub-pixar002", "", "5", "n/a", "F"],
    ]
    told = capsys.readouterr().out
    assert f"not used, age_years: found 'four'; expected a number: 1 ({path}, line 2)" in told
    assert "not used, sex: found 'x'; expected one of M, F" in told


def test_a_workbook_that_is_none_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"IXI.xlsx: cannot be read as a workbook"):
        read_labels(load_cohort("ixi"), [write(tmp_path / "IXI.xlsx", "not a workbook")])


def test_no_table_is_an_error_that_names_the_files_it_looked_for(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = ["--cohort", "ixi", "--out", str(tmp_path / "l.tsv"), str(tmp_path / "empty")]
    assert main(arguments) == 1
    assert r"no label table of cohort ixi in it; expected a file whose name fits ^IXI\." in capsys.readouterr().err
    assert main(["--cohort", "oasis-3", "--out", str(tmp_path / "l.tsv"), str(tmp_path)]) == 1
    assert "cohort oasis-3 has no label tables" in capsys.readouterr().err
    assert main(["--cohort", "ixi", "--out", str(tmp_path / "l.tsv"), str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "l.tsv").exists()
