"""Series in published trees: found with few reads, taken or left with a reason, never lost."""

import csv
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest

from braindino.preprocessing import dicom_series
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.conversion import convert
from braindino.preprocessing.dicom_series import find_series
from braindino.preprocessing.discovery import find_candidates, walk_sources
from braindino.volume import VolumeError, load_volume

TINY = np.arange(2 * 3 * 9, dtype=np.uint16).reshape(2, 3, 9)


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Names of the files whose headers were read."""
    names: list[str] = []
    read = pydicom.dcmread

    def reading(file, *args, **kwargs):
        names.append(Path(file.name).name)
        return read(file, *args, **kwargs)

    monkeypatch.setattr(dicom_series.pydicom, "dcmread", reading)
    return names


def series_in(folder: Path) -> list[dicom_series.Series]:
    return [series for series, _ in find_series(walk_sources([str(folder)], exclude_dir=folder / "out"))]


def write_metadata(folder: Path, rows: list[tuple[str, str, int]], *, windows: bool = False) -> None:
    """NBIA's table: uid, folder and number of images of each series."""
    with (folder / "metadata.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["Series UID", "Collection", "Subject ID", "Modality", "Number of Images", "File Location"])
        for uid, location, count in rows:
            text = ".\\" + location.replace("/", "\\") if windows else "./" + location
            writer.writerow([uid, "C", "P", "MR", count, text])


@pytest.mark.parametrize("windows", [False, True])
def test_one_read_does_where_metadata_counts_the_images(tmp_path, series, opened, windows):
    uid = series(tmp_path / "C/P1/study/series one")
    write_metadata(tmp_path, [(uid, "C/P1/study/series one", 12)], windows=windows)
    (found,) = series_in(tmp_path)
    assert opened == ["1-001.dcm"]
    assert (found.uid, found.num_images, found.expected_images) == (uid, 12, 12)
    assert (found.patient, found.study_date, found.description, found.modality) == ("P1", "2001-02-03", "AX T2", "MR")
    assert float(found.tags["EchoTime"]) == 90 and found.tags["ImageType"] == "ORIGINAL\\PRIMARY\\OTHER"
    assert found.order == ("102000", 3)


def test_three_reads_do_in_a_folder_as_nbia_names_it(tmp_path, series, opened):
    series(tmp_path / "C/P1/study/series")
    (found,) = series_in(tmp_path)
    assert sorted(opened) == ["1-001.dcm", "1-007.dcm", "1-012.dcm"]
    assert found.num_images == 12 and found.expected_images == 0 and found.whole_folder


def test_every_header_is_read_in_any_other_folder(tmp_path, series, opened):
    for number, description in enumerate(("AX T1", "AX T2", "AX FLAIR")):
        series(tmp_path / "export", first=1 + 12 * number, name="IM{number:04d}", SeriesDescription=description)
    (tmp_path / "export/README").write_text("no DICOM")
    (tmp_path / "export/DICOMDIR").write_bytes(bytes(128) + b"DICM")
    found = series_in(tmp_path)
    assert len(opened) == 36 + 2 and [s.num_images for s in found] == [12, 12, 12]
    assert {s.description: (s.files[0], s.files[-1]) for s in found} == {
        "AX T1": ("IM0001", "IM0012"),
        "AX T2": ("IM0013", "IM0024"),
        "AX FLAIR": ("IM0025", "IM0036"),
    }
    assert not any(s.whole_folder for s in found)


def test_a_sample_that_disagrees_makes_all_be_read(tmp_path, series, opened):
    series(tmp_path / "s")
    series(tmp_path / "s", first=13)
    assert [s.num_images for s in series_in(tmp_path)] == [12, 12]
    assert len(opened) == 24 + 1


def test_metadata_of_another_series_is_not_believed(tmp_path, series, opened):
    uid = series(tmp_path / "s")
    write_metadata(tmp_path, [("1.2.3", "s", 12), (uid, "../elsewhere", 12)])
    (found,) = series_in(tmp_path)
    assert found.uid == uid and found.expected_images == 0 and len(opened) == 12


def test_series_of_one_folder_become_scans_of_their_own(tmp_path, series, voxels):
    for number, (description, shown) in enumerate((("AX FLAIR", voxels), ("AX T2", voxels[::-1]))):
        series(
            tmp_path / "in/x",
            first=1 + 12 * number,
            voxels=shown,
            name="{number}",
            SeriesDescription=description,
            PatientID="900-00-1961",
        )
    found = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=load_cohort("rembrandt"))
    assert {c.scan.sequence for c in found} == {"T2", "FLAIR"} and len({c.scan.path for c in found}) == 2
    for candidate in found:
        convert(candidate.conversion, Path(candidate.scan.source), Path(candidate.scan.path))
        shown = voxels if candidate.scan.sequence == "FLAIR" else voxels[::-1]
        # Column and row 0 are the patient's right and front, slice 0 the lowest.
        assert load_volume(candidate.scan.path).data[-1, -1, 0] == shown[0, 0, 0]


def test_an_incomplete_download_is_noticed_by_its_table(tmp_path, series):
    uid = series(tmp_path / "in/C/W1/study/series", PatientID="W1", skip=[10, 11])
    write_metadata(tmp_path / "in", [(uid, "C/W1/study/series", 12)])
    (found,) = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=load_cohort("ivygap"))
    assert found.scan.status == "done", "its conversion quarantines it"
    with pytest.raises(VolumeError, match=r"10 images; expected the 12 that metadata\.csv counts") as caught:
        convert(found.conversion, Path(found.scan.source), Path(found.scan.path))
    assert caught.value.code == "missing_slices"


def candidates(folder: Path, cohort: str) -> dict[str, tuple[str, str, str]]:
    """Name of the series folder -> (subject, session, sequence) where taken, (code,) where left."""
    found = find_candidates([str(folder)], out_dir=folder.parent / "out", cohort=load_cohort(cohort))
    result = {}
    for candidate in found:
        scan = candidate.scan
        name = Path(candidate.origin).name
        assert name not in result
        result[name] = (
            (scan.subject, scan.session, scan.sequence) if scan.status == "done" else (scan.reason.partition(":")[0],)
        )
        assert (candidate.conversion is None) == (scan.status == "skipped")
    return result


def test_unreadable_files_get_a_row_and_stop_nothing(tmp_path, series):
    tree = tmp_path / "in/manifest-1/TCGA-GBM/TCGA-02-0003/study"
    series(tree / "good", voxels=TINY, PatientID="TCGA-02-0003")
    series(tree / "last", voxels=TINY, PatientID="TCGA-02-0003", SeriesNumber=4)
    (tree / "last/1-009.dcm").write_bytes(b"junk")
    (tree / "all").mkdir()
    for number in range(3):
        (tree / f"all/1-{number}.dcm").write_bytes(bytes(200))
    series(tree / "mixed", voxels=TINY, name="a{number}.dcm", PatientID="TCGA-02-0003", SeriesDescription="T1")
    series(tree / "mixed", voxels=TINY, name="b{number}.dcm", PatientID="TCGA-02-0003", SeriesDescription="FLAIR")
    (tree / "mixed/c.dcm").write_bytes(b"")
    found = candidates(tmp_path / "in", "tcga-gbm")
    taken = ("TCGA-02-0003", "2001-02-03")
    assert found == {
        "good": (*taken, "T2"),
        "last": (*taken, "T2"),
        "all": ("unreadable_dicom",),
        "a1.dcm": (*taken, "T1"),
        "b1.dcm": (*taken, "FLAIR"),
        "c.dcm": ("unreadable_dicom",),
    }
    rows = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=load_cohort("tcga-gbm"))
    broken = [row.scan for row in rows if row.scan.status == "quarantined"]
    assert sorted(Path(scan.source).name for scan in broken) == ["all", "c.dcm"]
    assert all(scan.reason.startswith("unreadable_dicom: ") for scan in broken)
    assert not [row for row in rows if row.scan.status == "skipped"]


def test_a_series_without_its_uid_is_quarantined_and_one_below_a_hidden_folder_left(tmp_path, series):
    series(tmp_path / "in/m/W1/study/nameless", voxels=TINY, PatientID="W1", SeriesInstanceUID="")
    series(tmp_path / "in/m/W1/study/good", voxels=TINY, PatientID="W1")
    (tmp_path / "in/m/.trash").mkdir()
    (tmp_path / "in/m/.trash/1-1.dcm").write_bytes(b"junk")
    found = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=load_cohort("ivygap"))
    assert {Path(c.origin).name: (c.scan.subject, c.scan.status, c.scan.reason) for c in found} == {
        "nameless": ("W1", "quarantined", "unreadable_dicom: no SeriesInstanceUID in the header"),
        "good": ("W1", "done", ""),
        ".trash": ("", "skipped", "hidden_file: its name or a folder's starts with a dot"),
    }


def test_a_series_that_lies_there_twice_is_taken_once(tmp_path, series):
    series(tmp_path / "in/m1/series", voxels=TINY, PatientID="W1")
    shutil.copytree(tmp_path / "in/m1/series", tmp_path / "in/m2/again")
    assert candidates(tmp_path / "in", "ivygap") == {
        "series": ("W1", "2001-02-03", "T2"),
        "again": ("duplicate_series",),
    }


def test_two_studies_of_one_day_are_two_sessions(tmp_path, series):
    for number, (study, time) in enumerate((("1.2.9", "080000"), ("1.2.3", "170000"))):
        series(tmp_path / f"in/{number}", voxels=TINY, PatientID="w2", study=study, StudyTime=time)
    series(tmp_path / "in/2", voxels=TINY, PatientID="W2", study="1.2.4", StudyDate="19991231")
    series(tmp_path / "in/3", voxels=TINY, PatientID="W2", study="1.2.5", StudyDate="")
    found = candidates(tmp_path / "in", "ivygap")
    assert {name: entry[1] for name, entry in found.items()} == {
        "0": "2001-02-03-study1",
        "1": "2001-02-03-study2",
        "2": "1999-12-31",
        "3": "",
    }
    assert {entry[0] for entry in found.values()} == {"W2"}


def plant(series, root: Path, location: str, patient: str, entries: dict[str, dict]) -> None:
    """Series folders below ``root/location``, named by their description as NBIA does."""
    for number, (description, tags) in enumerate(entries.items(), start=1):
        few = tags.pop("images", None)
        series(
            root / location / description,
            voxels=TINY[:, :, :few] if few else TINY,
            study=f"1.2.826.{zlib.crc32(location.encode())}",
            PatientID=patient,
            SeriesDescription=tags.pop("name", description),
            SeriesNumber=number,
            SeriesTime=f"10{number:02d}00",
            **tags,
        )


def test_tcga_gbm_with_everything_a_clinical_study_holds(tmp_path, series):
    plant(
        series,
        tmp_path / "in",
        "manifest-1669/TCGA-GBM/TCGA-06-0119/12-28-1998-NA-MRI BRAIN-13440",
        "TCGA-06-0119",
        {
            "3-PLANE LOC": {"images": 3},
            "SAG T1": {},
            "AX T2 FSE": {},
            "AX FLAIR": {},
            "AX DIFFUSION": {},
            "ADC": {"ImageType": ["DERIVED", "SECONDARY", "ADC"]},
            "PERFUSION": {},
            "AX T2 GRE": {},
            "AX T1": {},
            "COR T1 POST GD": {},
            "SUBTRACTION": {},
            "COR REFORMAT": {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]},
            "MRA": {},
            "AX PD": {},
            "AX": {"EchoTime": 12, "RepetitionTime": 500},
        },
    )
    study = ("TCGA-06-0119", "2001-02-03")
    assert candidates(tmp_path / "in", "tcga-gbm") == {
        "3-PLANE LOC": ("localiser",),
        "SAG T1": (*study, "T1"),
        "AX T2 FSE": (*study, "T2"),
        "AX FLAIR": (*study, "FLAIR"),
        "AX DIFFUSION": ("diffusion",),
        "ADC": ("diffusion",),
        "PERFUSION": ("perfusion",),
        "AX T2 GRE": ("susceptibility",),
        "AX T1": (*study, "T1c"),  # after the bolus of the perfusion series
        "COR T1 POST GD": (*study, "T1c"),
        "SUBTRACTION": ("subtraction",),
        "COR REFORMAT": ("derived_reformat",),
        "MRA": ("angiography",),
        "AX PD": ("proton_density",),
        "AX": (*study, "T1c"),
    }


def test_cptac_gbm_glis_rt_and_ivygap_leave_ct_and_structures(tmp_path, series):
    for cohort, patient, subject in (
        ("cptac-gbm", "C3L-00016", "C3L-00016"),
        ("glis-rt", "GLI_001_GBM", "GLI_001_GBM"),
        ("ivygap", "W11", "W11"),
        ("rembrandt", "HF1538", "HF1538"),
    ):
        entries = {
            "T1+Gd": {},
            "FLAIR": {},
            "CT HEAD": {"Modality": "CT"},
            "RTSTRUCT": {"Modality": "RTSTRUCT"},
            "REG": {"Modality": "REG"},
        }
        plant(series, tmp_path / cohort, f"manifest-1/{cohort.upper()}/{patient}/study", patient, entries)
        assert candidates(tmp_path / cohort, cohort) == {
            "T1+Gd": (subject, "2001-02-03", "T1c"),
            "FLAIR": (subject, "2001-02-03", "FLAIR"),
            "CT HEAD": ("other_modality",),
            "RTSTRUCT": ("segmentation",),
            "REG": ("not_an_image",),
        }


def test_the_row_for_ones_own_archive_in_the_documentation_does_what_it_says(tmp_path, series):
    page = (Path(__file__).parents[3] / "docs" / "cohorts.md").read_text(encoding="utf-8")
    row = re.search(r"^```yaml\n(name: our-archive\n.*?)^```$", page, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(row)
    agent = {"ContrastBolusAgent": "Gadovist"}
    before = {
        "AX T1": {},
        "T1 SPACE": {**agent, "MRAcquisitionType": "3D"},
        "Navigation": {},
        "T2 TSE": {"BodyPartExamined": "CSPINE"},
    }
    plant(series, tmp_path / "in", "pacs/ANON0042/before", "whoever", before)
    plant(series, tmp_path / "in", "pacs/ANON0042/during", "ANON0042", {"AX FLAIR": {}})
    plant(series, tmp_path / "in", "pacs/Smith/before", "Smith", {"SAG FLAIR": {}})
    assert candidates(tmp_path / "in", str(tmp_path / "mine.yaml")) == {
        "AX T1": ("A00042", "before", "T1"),
        "T1 SPACE": ("A00042", "before", "T1c"),
        "Navigation": ("A00042", "before", "T1c"),
        "T2 TSE": ("other_body_part",),
        # The path fits no pattern: PatientID and StudyDate count.
        "AX FLAIR": ("A00042", "2001-02-03", "FLAIR"),
        "SAG FLAIR": ("unrecognised",),
    }


def test_patients_of_another_collection_are_told(tmp_path, series):
    plant(series, tmp_path / "in", "manifest-1/X/1234/study", "1234", {"AX T2": {}})
    plant(series, tmp_path / "in", "manifest-1/X/900-00-1961/study", "900-00-1961", {"AX FLAIR": {}})
    assert candidates(tmp_path / "in", "rembrandt") == {
        "AX T2": ("unrecognised",),
        "AX FLAIR": ("900-00-1961", "2001-02-03", "FLAIR"),
    }


def test_meningioma_takes_the_navigation_scan_as_t1c(tmp_path, series):
    patient = "Meningioma-SEG-CLASS-001"
    entries = {"T3D Stealth": {}, "AX FLAIR": {}, "RTSTRUCT T1c": {"Modality": "RTSTRUCT"}}
    plant(series, tmp_path / "in", f"manifest-1/Meningioma-SEG-CLASS/{patient}/study", patient, entries)
    assert candidates(tmp_path / "in", "men-seg-class") == {
        "T3D Stealth": (patient, "2001-02-03", "T1c"),
        "AX FLAIR": (patient, "2001-02-03", "FLAIR"),
        "RTSTRUCT T1c": ("segmentation",),
    }


def test_remind_keeps_before_and_during_surgery_apart(tmp_path, series):
    before = {"3D_AX_T1_postcontrast": {}, "3DSAGT2SPACE": {}, "SEG tumor": {"Modality": "SEG"}}
    during = {
        "2D_AX_T2_FLAIR": {},
        "3D_AX_T1_precontrast": {},
        "USpredura": {"Modality": "US"},
        "2D_AX_T2_BLADE": {"ImageType": ["DERIVED", "SECONDARY"]},
    }
    root = "manifest-1694/ReMIND/ReMIND-001"
    plant(series, tmp_path / "in", f"{root}/12-25-1982-NA-Preop-90478", "ReMIND-001", before)
    plant(series, tmp_path / "in", f"{root}/12-25-1982-NA-Intraop-90478", "ReMIND-001", during)
    assert candidates(tmp_path / "in", "remind") == {
        "3D_AX_T1_postcontrast": ("ReMIND-001", "preop", "T1c"),
        "3DSAGT2SPACE": ("ReMIND-001", "preop", "T2"),
        "SEG tumor": ("segmentation",),
        "2D_AX_T2_FLAIR": ("ReMIND-001", "intraop", "FLAIR"),
        "3D_AX_T1_precontrast": ("ReMIND-001", "intraop", "T1"),
        "USpredura": ("other_modality",),
        "2D_AX_T2_BLADE": ("ReMIND-001", "intraop", "T2"),
    }


def test_acrin_leaves_masks_maps_and_pet(tmp_path, series):
    dsc = {
        "AX T1 PRE": {},
        "AX T1 POST": {},
        "ROI Mask": {},
        "rCBV": {},
        "DSC": {},
        "DCE T1": {},
        "MRS": {},
        "AX T2": {"StudyDate": "19600115"},
    }
    plant(series, tmp_path / "dsc", "manifest-1/ACRIN-DSC-MR-Brain/007/study", "007", dsc)
    found = candidates(tmp_path / "dsc", "acrin-dsc-mr-brain")
    assert found.pop("AX T2") == ("ACRIN-DSC-MR-Brain-007", "1960-01-15", "T2")
    assert found == {
        "AX T1 PRE": ("ACRIN-DSC-MR-Brain-007", "2001-02-03", "T1"),
        "AX T1 POST": ("ACRIN-DSC-MR-Brain-007", "2001-02-03", "T1c"),
        "ROI Mask": ("mask_or_roi",),
        "rCBV": ("perfusion",),
        "DSC": ("perfusion",),
        "DCE T1": ("perfusion",),
        "MRS": ("spectroscopy",),
    }
    name = "ACRIN-FMISO-Brain-012"
    fmiso = {"AX T1 POST": {}, "FMISO SUV": {}, "PET AC": {"Modality": "PT"}, "H2O MAP": {"Modality": "OT"}}
    plant(series, tmp_path / "fmiso", f"manifest-1/ACRIN-FMISO-Brain/{name}/study", name, fmiso)
    assert candidates(tmp_path / "fmiso", "acrin-fmiso-brain") == {
        "AX T1 POST": (name, "2001-02-03", "T1c"),
        "FMISO SUV": ("other_modality",),
        "PET AC": ("other_modality",),
        "H2O MAP": ("other_modality",),
    }
