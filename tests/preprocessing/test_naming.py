"""Names: what they say is read, what they do not say stays unknown."""

import re
from pathlib import PurePosixPath

import pytest

from braindino.preprocessing.naming import is_nifti_name, read_name

SCANS = [
    # path below the source, subject, session, sequence
    ("sub-01/anat/sub-01_T1w.nii.gz", "sub-01", "", "T1"),
    ("sub-01/ses-2/anat/sub-01_ses-2_T2w.nii", "sub-01", "ses-2", "T2"),
    ("sub-01/ses-2/anat/sub-01_ses-2_ce-gadolinium_T1w.nii.gz", "sub-01", "ses-2", "T1c"),
    ("sub-A7/ses-pre/anat/sub-A7_ses-pre_acq-sag_run-2_FLAIR.nii.gz", "sub-A7", "ses-pre", "FLAIR"),
    ("BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1n.nii.gz", "BraTS-GLI-00001-000", "", "T1"),
    ("BraTS-GLI-00001-000-t1c.nii.gz", "BraTS-GLI-00001-000", "", "T1c"),
    ("BraTS-GLI-00001-000-t2w.nii.gz", "BraTS-GLI-00001-000", "", "T2"),
    ("BraTS-GLI-00001-000-t2f.nii.gz", "BraTS-GLI-00001-000", "", "FLAIR"),
    ("HGG/BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz", "BraTS20_Training_001", "", "T1c"),
    ("TCGA-02-0006/1996.08.23/TCGA-02-0006_1996.08.23_flair.nii.gz", "TCGA-02-0006", "", "FLAIR"),
    ("tcga-fg-6692/raw_fla.nii.gz", "tcga-fg-6692", "", "FLAIR"),
    ("tcga-fg-6692/raw_t1.nii.gz", "tcga-fg-6692", "", "T1"),
    ("UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c_bias.nii.gz", "UCSF-PDGM-0004_nifti", "", "T1c"),
    ("UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1GD.nii.gz", "UPENN-GBM-00001_11", "", "T1c"),
    ("IXI002-Guys-0828-T1.nii.gz", "IXI002-Guys-0828", "", "T1"),
    ("p3/MPRAGE.nii", "p3", "", "T1"),
    ("P7/T2_FLAIR.nii.gz", "P7", "", "FLAIR"),
    ("P7/T1_Gd.nii.gz", "P7", "", "T1c"),
    ("P7/T1_pre_Gd.nii.gz", "P7", "", "T1"),
    ("PD_001_T1.nii.gz", "PD_001", "", "T1"),  # a Parkinson's cohort, no proton density
    ("t1.nii.gz", "source", "", "T1"),
    ("1000_SS.nii.gz", "1000_SS", "", "unknown"),
    ("chart12.nii.gz", "chart12", "", "unknown"),
    ("part2/weight2.nii.gz", "part2", "", "unknown"),
    ("P8/T1_to_T2.nii.gz", "P8", "", "unknown"),
]


@pytest.mark.parametrize(("path", "subject", "session", "sequence"), SCANS)
def test_names_say_subject_session_and_sequence(path, subject, session, sequence):
    facts = read_name(PurePosixPath(path), source_name="source")
    assert (facts.subject, facts.session, facts.sequence, facts.skip) == (subject, session, sequence, "")


@pytest.mark.parametrize(
    ("path", "skip"),
    [
        ("sub-01/anat/sub-01_desc-brain_mask.nii.gz", "label: BIDS suffix 'mask'"),
        ("sub-01/anat/sub-01_label-GM_probseg.nii.gz", "label: BIDS suffix 'probseg'"),
        ("sub-01/dwi/sub-01_dir-AP_dwi.nii.gz", "other_modality: BIDS suffix 'dwi'"),
        ("sub-01/func/sub-01_task-rest_bold.nii.gz", "other_modality: BIDS suffix 'bold'"),
        ("sub-01/perf/sub-01_asl.nii.gz", "other_modality: BIDS suffix 'asl'"),
        ("1000_mask.nii.gz", "label: 'mask' in the file name"),
        ("1000_tissues.nii.gz", "label: 'tissues' in the file name"),
        ("tcga-fg-6692/seg.nii.gz", "label: 'seg' in the file name"),
        ("tcga-fg-6692/hdbet_mask_t1.nii.gz", "label: 'mask' in the file name"),
        ("BraTS-GLI-00001-000-SEG.nii.gz", "label: 'seg' in the file name"),
        ("UCSF-PDGM-0004_DTI_eddy_FA.nii.gz", "other_modality: 'dti' in the file name"),
        ("IXI002-Guys-0828-MRA.nii.gz", "other_modality: 'mra' in the file name"),
        ("derivatives/fmriprep/sub-01/anat/sub-01_T1w.nii.gz", "derivative: below"),
        ("._P7_T1.nii.gz", "hidden_file: its name or a folder's starts with a dot"),
    ],
)
def test_files_that_are_no_scan_are_left_with_a_reason(path, skip):
    assert read_name(PurePosixPath(path), source_name="source").skip.startswith(skip)


def test_a_pattern_overrides_what_the_name_says():
    pattern = re.compile(r"(?P<subject>BraTS-GLI-\d+)-(?P<session>\d+)-(?P<sequence>\w+)")
    facts = read_name(PurePosixPath("BraTS-GLI-00001-003-t2f.nii.gz"), source_name="s", subject_pattern=pattern)
    assert (facts.subject, facts.session, facts.sequence) == ("BraTS-GLI-00001", "003", "FLAIR")


def test_a_pattern_must_match_every_scan_but_not_the_files_that_are_left():
    pattern = re.compile(r"(?P<subject>\d+)_SS")
    assert read_name(PurePosixPath("x_mask.nii"), source_name="s", subject_pattern=pattern).skip
    with pytest.raises(ValueError, match=r"--subject-pattern .* does not match 'x/y\.nii'; widen"):
        read_name(PurePosixPath("x/y.nii"), source_name="s", subject_pattern=pattern)


def test_a_pattern_that_finds_no_known_sequence_says_what_is_known():
    pattern = re.compile(r"(?P<subject>\w+)\.(?P<sequence>\w+)\.nii")
    with pytest.raises(ValueError, match=r"group 'sequence' is 't7' .* expected one of fla, flair, mprage, t1"):
        read_name(PurePosixPath("p1.t7.nii"), source_name="s", subject_pattern=pattern)


def test_a_given_sequence_fills_in_but_does_not_override():
    assert read_name(PurePosixPath("1000_SS.nii.gz"), source_name="s", sequence="T1").sequence == "T1"
    assert read_name(PurePosixPath("1000_T2.nii.gz"), source_name="s", sequence="T1").sequence == "T2"


def test_nifti_names_are_told_by_their_ending_in_any_case():
    assert [is_nifti_name(name) for name in ("a.nii", "a.NII.GZ", "a.nii.gz.part", "nii.gz", "a.mgz")] == [
        True, True, False, False, False,
    ]  # fmt: skip
