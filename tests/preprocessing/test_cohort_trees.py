"""Each row on a tree in its cohort's published layout: exactly the right scans are taken, all else is left with why."""

from pathlib import Path

import pytest

from braindino.manifest import Scan
from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.discovery import Candidate, find_candidates

# Row -> input below the source -> (subject, session, sequence) of what is taken, or the reason code of what is left.
# Inputs are empty files: nothing is opened. A path that ends in / is a folder with three DICOM files.
TREES: dict[str, dict[str, tuple[str, str, str] | str]] = {
    "ixi": {
        "IXI-T1/IXI002-Guys-0828-T1.nii.gz": ("IXI002", "", "T1"),
        "IXI-T1/IXI013-HH-1212-T1.nii.gz": ("IXI013", "", "T1"),
        "IXI-T2/IXI002-Guys-0828-T2.nii.gz": ("IXI002", "", "T2"),
        "IXI-PD/IXI002-Guys-0828-PD.nii.gz": "proton_density",
        "IXI-MRA/IXI573-IOP-1155-MRA.nii.gz": "angiography",
        "IXI-DTI/IXI002-Guys-0828-DTI-00.nii.gz": "diffusion",
        "IXI-DTI/IXI002-Guys-0828-DTI-15.nii.gz": "diffusion",
        "IXI-T1/._IXI002-Guys-0828-T1.nii.gz": "hidden_file",
        "IXI-T1/template.nii.gz": "unrecognised",
    },
    "id1000": {
        "ds003097/sub-0001/anat/sub-0001_run-1_T1w.nii.gz": ("sub-0001", "", "T1"),
        "ds003097/sub-0001/anat/sub-0001_run-2_T1w.nii.gz": "repeat",
        "ds003097/sub-0001/anat/sub-0001_run-10_T1w.nii.gz": "repeat",
        "ds003097/sub-0001/dwi/sub-0001_run-1_dwi.nii.gz": "other_modality",
        "ds003097/sub-0001/func/sub-0001_task-moviewatching_bold.nii.gz": "other_modality",
        "ds003097/derivatives/fmriprep/sub-0001/anat/sub-0001_desc-preproc_T1w.nii.gz": "derivative",
        "ds003097/derivatives/freesurfer/sub-0001/mri/T1.mgz": "derivative",
    },
    "piop1": {
        "ds002785/sub-0001/anat/sub-0001_T1w.nii.gz": ("sub-0001", "", "T1"),
        "ds002785/sub-0001/fmap/sub-0001_phasediff.nii.gz": "other_modality",
        "ds002785/derivatives/fmriprep/sub-0001/anat/sub-0001_desc-preproc_T1w.nii.gz": "derivative",
    },
    "piop2": {
        "ds002790/sub-0226/anat/sub-0226_T1w.nii.gz": ("sub-0226", "", "T1"),
        "ds002790/derivatives/fmriprep/sub-0226/anat/sub-0226_desc-brain_mask.nii.gz": "derivative",
    },
    "long579": {
        "ds003604/sub-5003/ses-5/anat/sub-5003_ses-5_acq-D1S3_T1w.nii.gz": ("sub-5003", "ses-5", "T1"),
        "ds003604/sub-5003/ses-7/anat/sub-5003_ses-7_acq-D1S2_T1w.nii.gz": ("sub-5003", "ses-7", "T1"),
        "ds003604/sub-5003/ses-7/anat/sub-5003_ses-7_acq-D2S9_T1w.nii.gz": ("sub-5003", "ses-7", "T1"),
        "ds003604/sub-5003/ses-7/func/sub-5003_ses-7_task-Phon_acq-D1S5_run-01_bold.nii.gz": "other_modality",
    },
    "pixar": {
        "ds000228/sub-pixar001/anat/sub-pixar001_T1w.nii.gz": ("sub-pixar001", "", "T1"),
        "ds000228/sub-pixar001/func/sub-pixar001_task-pixar_bold.nii.gz": "other_modality",
        "ds000228/derivatives/preprocessed_data/sub-pixar001/sub-pixar001_normed_anat.nii.gz": "derivative",
        "ds000228/sub-01/anat/sub-01_T1w.nii.gz": "unrecognised",
    },
    "abide": {
        "RawData/NYU/0050952/session_1/anat_1/mprage.nii.gz": ("0050952", "1", "T1"),
        "RawData/NYU/0050952/session_1/anat_2/mprage.nii.gz": "repeat",
        "RawData/NYU/0050952/session_1/rest_1/rest.nii.gz": "functional",
        "RawData/UCLA_1/0051201/session_1/hires_1/hires.nii.gz": "other_modality",
        "ABIDEII-SDSU/28852/session_1/anat_1/anat.nii.gz": ("0028852", "1", "T1"),
        "ABIDEII-SDSU/28852/session_1/dti_1/dti.nii.gz": "diffusion",
        "ABIDEII-UPSM_Long/28852/session_2/anat_1/anat.nii.gz": ("0028852", "2", "T1"),
        "bids/sub-0050004/anat/sub-0050004_T1w.nii.gz": ("0050004", "", "T1"),
        "bids/sub-0050004/func/sub-0050004_task-rest_run-1_bold.nii.gz": "functional",
        "ABIDE/50455/MP-RAGE/2000-01-01_00_00_00.0/S164623/"
        "ABIDE_50455_MRI_MP-RAGE_br_raw_20120830173854796_S164623_I328631.nii": ("0050455", "2000-01-01", "T1"),
        "Outputs/freesurfer/5.1/NYU_0050952/mri/brain.mgz": "derivative",
    },
    "ppmi": {
        "PPMI/3102/MPRAGE_GRAPPA/2011-01-25_10_03_54.0/S139451/": ("3102", "2011-01-25", "T1"),
        "PPMI/3102/MPRAGE_Repeat/2011-01-25_10_03_54.0/S139452/": "repeat",
        "PPMI/3102/SAG_T1_3D_FSPGR_ND/2011-01-25_10_03_54.0/S139453/": "repeat",
        # The only one of its visit.
        "PPMI/3102/MPRAGE_Repeat/2013-03-05_10_03_54.0/S9/": ("3102", "2013-03-05", "T1"),
        "PPMI/3102/AX_T1/2011-01-25_10_03_54.0/S139454/": "other_weighting",
        "PPMI/3102/DTI_gated/2011-01-25_10_03_54.0/S139455/": "diffusion",
        "PPMI/3102/ep2d_RESTING_STATE/2011-01-25_10_03_54.0/S139456/": "functional",
        "PPMI/3102/3_Plane_Localizer/2011-01-25_10_03_54.0/S139457/": "localiser",
        "PPMI/3102/T2_FLAIR/2012-02-01_11_00_00.0/S2/PPMI_3102_MR_T2_FLAIR_br_raw_2012_1_S2_I9.nii": (
            "3102",
            "2012-02-01",
            "FLAIR",
        ),
        "PPMI/3102/MPRAGE_GRAPPA/2012-02-01_11_00_00.0/S3/PPMI_3102_MR_MPRAGE_GRAPPA_br_raw_2012_S3_I8.nii": (
            "3102",
            "2012-02-01",
            "T1",
        ),
        "PPMI/3102/notes/scan.nii": "unrecognised",
    },
    "icbm": {
        "ICBM/MNI_0001/T1_MPRAGE/2000-05-01_00_00_00.0/S11/": ("MNI_0001", "2000-05-01", "T1"),
        "ICBM/MNI_0001/T2_TSE/2000-05-01_00_00_00.0/S12/ICBM_MNI_0001_MR_T2_TSE_S12_I12.nii": (
            "MNI_0001",
            "2000-05-01",
            "T2",
        ),
        "ICBM/MNI_0001/PD_T2_TSE/2000-05-01_00_00_00.0/S13/": "proton_density",
        "ICBM/MNI_0001/MT_ON/2000-05-01_00_00_00.0/S14/": "quantitative_map",
        "ICBM/MNI_0001/TOF_MRA/2000-05-01_00_00_00.0/S15/": "angiography",
    },
    "adni": {
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/MPR__GradWarp__B1_Correction__N3__Scaled/2006-04-18_08_20_30.0/I45108/"
        "ADNI_002_S_0295_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_20070319113623975_S13408_I45108.nii": (
            "002_S_0295",
            "2006-04-18",
            "T1",
        ),
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/MPR-R__GradWarp__B1_Correction__N3__Scaled/2006-04-18_08_20_30.0/I45107/"
        "ADNI_002_S_0295_MR_MPR-R__GradWarp__B1_Correction__N3__Scaled_Br_2007_S13407_I45107.nii": "repeat",
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/MPR__GradWarp__B1_Correction__N3__Scaled_2/2006-04-18_08_20_30.0/I118671/"
        "ADNI_002_S_0295_MR_MPR__GradWarp__B1_Correction__N3__Scaled_2_Br_2008_S13408_I118671.nii": "repeat",
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/MPR-R__GradWarp__B1_Correction__N3__Scaled/2006-11-02_08_16_44.0/I40966/"
        "ADNI_002_S_0295_MR_MPR-R__GradWarp__B1_Correction__N3__Scaled_Br_2007_S21856_I40966.nii": (
            "002_S_0295",
            "2006-11-02",
            "T1",
        ),
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/MPR__GradWarp__N3__Scaled__Mask/2006-11-02_08_16_44.0/I5/ADNI_I5.nii": (
            "label"
        ),
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/B1-calibration_Head/2006-11-02_08_16_44.0/I6/": "calibration",
        "ADNI1_Complete_3Yr_1.5T/002_S_0295/Axial_PD_T2_FSE/2006-11-02_08_16_44.0/I7/": "proton_density",
    },
    "oasis-1": {
        "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/SUBJ_111/OAS1_0001_MR1_mpr_n4_anon_sbj_111.img": (
            "OAS1_0001",
            "MR1",
            "T1",
        ),
        "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-1_anon.img": "repeat",
        "disc1/OAS1_0001_MR1/RAW/OAS1_0001_MR1_mpr-2_anon.img": "repeat",
        "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.img": "derivative",
        "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.img": "derivative",
        "disc1/OAS1_0001_MR1/FSL_SEG/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.img": "derivative",
        "disc12/OAS1_0061_MR1/PROCESSED/MPRAGE/SUBJ_111/OAS1_0061_MR1_mpr_n3_anon_sbj_111.img": (
            "OAS1_0061",
            "MR1",
            "T1",
        ),
        "disc12/OAS1_0061_MR2/PROCESSED/MPRAGE/SUBJ_111/OAS1_0061_MR2_mpr_n3_anon_sbj_111.img": "repeat",
    },
    "oasis-3": {
        "OAS30001_MR_d0129/anat1/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz": ("sub-OAS30001", "ses-d0129", "T1"),
        "OAS30001_MR_d0129/anat2/sub-OAS30001_ses-d0129_run-02_T1w.nii.gz": "repeat",
        "OAS30001_MR_d0757/anat1/sub-OAS30001_ses-d0757_acq-TSE_T2w.nii.gz": ("sub-OAS30001", "ses-d0757", "T2"),
        "OAS30001_MR_d0757/anat3/sub-OAS30001_ses-d0757_FLAIR.nii.gz": ("sub-OAS30001", "ses-d0757", "FLAIR"),
        "OAS30001_MR_d0757/func1/sub-OAS30001_ses-d0757_task-rest_run-01_bold.nii.gz": "other_modality",
        "OAS30001_MR_d0757/swi1/sub-OAS30001_ses-d0757_swi.nii.gz": "other_modality",
    },
    "atlas": {
        "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz": (
            "sub-r001s001",
            "ses-1",
            "T1",
        ),
        "ATLAS_2/Training/R001/sub-r001s001/ses-1/anat/"
        "sub-r001s001_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz": "label",
        "ATLAS_2/MNI152NLin2009aSym.nii.gz": "derivative",
        "ATLAS3_Training_Raw/SOOP/sub-soop0910/ses-1/anat/sub-soop0910_ses-1_space-orig_desc-brain_T1w.nii.gz": (
            "sub-soop0910",
            "ses-1",
            "T1",
        ),
        "ATLAS3_Training_Raw/SOOP/sub-soop0910/ses-1/anat/"
        "sub-soop0910_ses-1_space-orig_label-lesion_desc-T1lesion_mask.nii.gz": "label",
    },
    "upenn-gbm": {
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1.nii.gz": ("UPENN-GBM-00001", "11", "T1"),
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1GD.nii.gz": ("UPENN-GBM-00001", "11", "T1c"),
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T2.nii.gz": ("UPENN-GBM-00001", "11", "T2"),
        "images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_FLAIR.nii.gz": ("UPENN-GBM-00001", "11", "FLAIR"),
        "images_structural/UPENN-GBM-00001_21/UPENN-GBM-00001_21_T1.nii.gz": ("UPENN-GBM-00001", "21", "T1"),
        "images_structural_unstripped/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1_unstripped.nii.gz": "repeat",
        "automated_segm/UPENN-GBM-00001_11_automated_approx_segm.nii.gz": "label",
        "images_segm/UPENN-GBM-00001_11_segm.nii.gz": "label",
        "images_DTI/UPENN-GBM-00001_11/UPENN-GBM-00001_11_DTI_FA.nii.gz": "diffusion",
        "images_DSC/UPENN-GBM-00001_11/UPENN-GBM-00001_11_DSC_ap-rCBV.nii.gz": "perfusion",
    },
    "ucsf-pdgm": {
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1.nii.gz": ("UCSF-PDGM-0004", "", "T1"),
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1c.nii.gz": ("UCSF-PDGM-0004", "", "T1c"),
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T2.nii.gz": ("UCSF-PDGM-0004", "", "T2"),
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_FLAIR.nii.gz": ("UCSF-PDGM-0004", "", "FLAIR"),
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_T1_bias.nii.gz": "repeat",
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_DTI_eddy_FA.nii.gz": "diffusion",
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_ADC.nii.gz": "diffusion",
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_SWI.nii.gz": "susceptibility",
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_ASL.nii.gz": "perfusion",
        "UCSF-PDGM-v5/UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_tumor_segmentation.nii.gz": "label",
        "UCSF-PDGM-v5/UCSF-PDGM-0433_FU007d_nifti/UCSF-PDGM-0433_FU007d_FLAIR.nii.gz": (
            "UCSF-PDGM-0433",
            "FU007d",
            "FLAIR",
        ),
    },
    "brats2021": {
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000/BraTS2021_00000_t1.nii.gz": (
            "BraTS2021_00000",
            "",
            "T1",
        ),
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz": (
            "BraTS2021_00000",
            "",
            "T1c",
        ),
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000/BraTS2021_00000_t2.nii.gz": (
            "BraTS2021_00000",
            "",
            "T2",
        ),
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000/BraTS2021_00000_flair.nii.gz": (
            "BraTS2021_00000",
            "",
            "FLAIR",
        ),
        "RSNA_ASNR_MICCAI_BraTS2021_TrainingData/BraTS2021_00000/BraTS2021_00000_seg.nii.gz": "label",
    },
    "brats2024-goat": {
        **{
            f"MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth/BraTS-GoAT-00000/BraTS-GoAT-00000-{suffix}.nii.gz": (
                "BraTS-GoAT-00000",
                "",
                sequence,
            )
            for suffix, sequence in (("t1n", "T1"), ("t1c", "T1c"), ("t2w", "T2"), ("t2f", "FLAIR"))
        },
        "MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth/BraTS-GoAT-00000/BraTS-GoAT-00000-seg.nii.gz": "label",
    },
}

for row, tag, top in (
    ("brats2025-gli-pre", "GLI", "BraTS2025-GLI-PRE-Challenge-TrainingData"),
    ("brats2023-ped", "PED", "ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData"),
    ("brats2023-men", "MEN", "BraTS2023-MEN"),
    ("brats2023-ssa", "SSA", "ASNR-MICCAI-BraTS2023-SSA-Challenge-TrainingData_V2"),
    ("brats2023-mets", "MET", "ASNR-MICCAI-BraTS2023-MET-Challenge-TrainingData"),
):
    TREES[row] = {
        f"{top}/BraTS-{tag}-00002-{visit}/BraTS-{tag}-00002-{visit}-{suffix}.nii.gz": (
            (f"BraTS-{tag}-00002", visit, sequence) if sequence != "label" else sequence
        )
        for visit in ("000", "001")
        for suffix, sequence in (("t1n", "T1"), ("t1c", "T1c"), ("t2w", "T2"), ("t2f", "FLAIR"), ("seg", "label"))
    }
    # Another challenge's case does not belong.
    TREES[row][f"{top}/BraTS-XYZ-00002-000/BraTS-XYZ-00002-000-t1n.nii.gz"] = "unrecognised"

TREES["brain-age"] = {
    **TREES["long579"],
    **{path: outcome for path, outcome in TREES["ixi"].items() if not path.endswith("T2.nii.gz")},
    **{path: outcome for path, outcome in TREES["pixar"].items() if "sub-pixar" in path},
    "IXI-T2/IXI002-Guys-0828-T2.nii.gz": "other_sequence",
}
TREES["piop"] = {**TREES["piop1"], **TREES["piop2"], "elsewhere/sub-0001/anat/sub-0001_T1w.nii.gz": "unrecognised"}
TREES["brats-sequence"] = {
    path: outcome for row in ("brats2023-men", "brats2023-ped", "brats2023-ssa") for path, outcome in TREES[row].items()
}


def make_tree(root: Path, inputs: dict[str, tuple[str, str, str] | str]) -> None:
    for name in inputs:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
            for number in range(3):
                (root / name / f"image_{number}.dcm").touch()
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
        if name.endswith(".img"):
            (root / name).with_suffix(".hdr").touch()
        (root / name).with_suffix(".json").touch()


def outcomes(candidates: list[Candidate], root: Path) -> dict[str, tuple[str, str, str] | str]:
    result = {}
    for candidate in candidates:
        name = str(Path(candidate.origin).relative_to(root)) + ("/" if Path(candidate.origin).is_dir() else "")
        assert name not in result, f"{name} has two candidates"
        result[name] = outcome(candidate.scan)
    return result


def outcome(scan: Scan) -> tuple[str, str, str] | str:
    if scan.status == "skipped":
        code, _, words = scan.reason.partition(": ")
        assert words, scan
        return code
    return scan.subject, scan.session, scan.sequence


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_cohort_in_its_published_layout_gives_its_scans_and_a_reason_for_each_other_image(tmp_path, name):
    make_tree(tmp_path / "data", TREES[name])
    found = find_candidates([str(tmp_path / "data")], out_dir=tmp_path / "out", cohort=load_cohort(name))
    assert outcomes(found, tmp_path / "data") == TREES[name]
    members = load_cohort(name).members or (name,)
    assert {candidate.scan.cohort for candidate in found} <= set(members)
    taken = [candidate.scan for candidate in found if candidate.scan.status == "done"]
    assert len({scan.scan_id for scan in taken}) == len(taken)
    assert {scan.sequence for scan in taken} <= set(load_cohort(name).sequences)


# The parts of a cohort of several are told apart by the whole path.
@pytest.mark.parametrize("name", sorted(name for name in TREES if not load_cohort(name).members))
def test_identities_do_not_depend_on_where_a_cohort_lies_or_which_of_its_folders_is_given(tmp_path, name):
    make_tree(tmp_path / "data", TREES[name])
    make_tree(tmp_path / "elsewhere/deep", TREES[name])

    def identities(*sources: Path) -> set[str]:
        found = find_candidates(list(map(str, sources)), out_dir=tmp_path / "out", cohort=load_cohort(name))
        return {candidate.scan.scan_id for candidate in found if candidate.scan.status == "done"}

    whole = identities(tmp_path / "data")
    assert identities(tmp_path / "elsewhere") == whole
    taken = [key for key, value in TREES[name].items() if isinstance(value, tuple)]
    assert identities(*sorted({(tmp_path / "data" / key).parent for key in taken if key[-1] != "/"} | {
        tmp_path / "data" / key for key in taken if key[-1] == "/"})) == whole  # fmt: skip


def test_series_and_pairs_are_converted_under_names_of_ours(tmp_path):
    make_tree(tmp_path / "ppmi", TREES["ppmi"])
    found = find_candidates([str(tmp_path / "ppmi")], out_dir=tmp_path / "out", cohort=load_cohort("ppmi"))
    series = [candidate for candidate in found if candidate.conversion is not None]
    assert [(item.conversion.kind, Path(item.scan.source).name) for item in series] == [
        ("dicom", "S139451"),
        ("dicom", "S9"),
    ]
    assert Path(series[0].scan.path).parent == tmp_path / "out/converted"
    assert len(Path(series[0].scan.path).name) == len("0123456789abcdef.nii.gz")
    make_tree(tmp_path / "oasis", TREES["oasis-1"])
    found = find_candidates([str(tmp_path / "oasis")], out_dir=tmp_path / "out", cohort=load_cohort("oasis-1"))
    pairs = [candidate for candidate in found if candidate.conversion is not None]
    assert [Path(item.scan.source).name for item in pairs] == [
        "OAS1_0001_MR1_mpr_n4_anon_sbj_111.img",
        "OAS1_0061_MR1_mpr_n3_anon_sbj_111.img",
    ]
    assert dict(pairs[0].conversion.parameters)["affine"] == ((0, 0, -1, 80), (1, 0, 0, -128), (0, 1, 0, -128))


def test_half_an_analyze_pair_and_formats_nobody_reads_are_left_with_why(tmp_path):
    names = ("OAS1_0001_MR1_mpr_n4_anon_sbj_111.hdr", "a.mgz", "b.nrrd", "c.HDR", "c.IMG")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "OAS1_0002_MR1_mpr_n4_anon_sbj_111.img").touch()
    (tmp_path / "OAS1_0002_MR1_mpr_n4_anon_sbj_111.hdr").touch()
    found = find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("oasis-1"))
    assert outcomes(found, tmp_path) == {
        "OAS1_0001_MR1_mpr_n4_anon_sbj_111.hdr": "incomplete",
        "OAS1_0002_MR1_mpr_n4_anon_sbj_111.img": ("OAS1_0002", "MR1", "T1"),
        "a.mgz": "other_format",
        "b.nrrd": "other_format",
        "c.IMG": "unrecognised",
    }


def test_the_program_s_own_output_inside_a_source_is_no_input(tmp_path):
    make_tree(tmp_path, TREES["oasis-1"])
    (tmp_path / "out/converted").mkdir(parents=True)
    (tmp_path / "out/converted/0123456789abcdef.nii.gz").touch()
    found = find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("oasis-1"))
    assert len(found) == len(TREES["oasis-1"])


def test_a_folder_of_something_else_is_an_error_that_says_what_was_expected(tmp_path):
    make_tree(tmp_path / "data", TREES["upenn-gbm"])
    with pytest.raises(ValueError, match=r"none of the 10 images is of the cohort ixi.*expected IXI-T1/IXI002"):
        find_candidates([str(tmp_path / "data")], out_dir=tmp_path / "out", cohort=load_cohort("ixi"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/readme.txt").touch()
    with pytest.raises(ValueError, match=r"notes: no image in it; expected IXI"):
        find_candidates([str(tmp_path / "notes")], out_dir=tmp_path / "out", cohort=load_cohort("ixi"))


def test_two_copies_of_a_dataset_are_refused_with_both_places(tmp_path):
    for copy in ("one", "two"):
        make_tree(tmp_path / copy, TREES["brats2021"])
    with pytest.raises(
        ValueError, match=r"one/.*_flair.nii.gz and .*two/.*_flair.nii.gz would both be .*BraTS2021_00000"
    ):
        find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("brats2021"))


def test_a_row_says_itself_what_options_would(tmp_path):
    make_tree(tmp_path, TREES["ixi"])
    with pytest.raises(ValueError, match=r"--sequence and --subject-pattern are for datasets without a row"):
        find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("ixi"), sequence="T1")
    with pytest.raises(ValueError, match=r"--cohort-name: cohort brain-age consists of ixi, long579, pixar"):
        find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("brain-age"), name="mine")
    named = find_candidates([str(tmp_path)], out_dir=tmp_path / "out", cohort=load_cohort("ixi"), name="mine")
    assert {candidate.scan.cohort for candidate in named} == {"mine"}


def test_without_a_row_names_are_read_as_ever(tmp_path):
    make_tree(tmp_path / "study", {"p1/t1.nii.gz": "", "p1/t1_mask.nii.gz": "", "p2/flair.nii.gz": ""})
    found = find_candidates([str(tmp_path / "study")], out_dir=tmp_path / "out", name="Mine")
    assert outcomes(found, tmp_path / "study") == {
        "p1/t1.nii.gz": ("p1", "", "T1"),
        "p2/flair.nii.gz": ("p2", "", "FLAIR"),
        "p1/t1_mask.nii.gz": "label",
    }
    assert {candidate.scan.cohort for candidate in found} == {"Mine"}


@pytest.mark.parametrize(
    ("cohort", "description", "expected"),
    [
        ("ppmi", "MPRAGE_GRAPPA2_adni_", "T1"),
        ("ppmi", "SAG_T1_3D_FSPGR", "T1"),
        ("ppmi", "3D_T1-weighted", "T1"),
        ("ppmi", "sag_3D_FSPGR_BRAVO_straight", "T1"),
        ("ppmi", "t1_mpr_ns_sag_p2_iso", "T1"),
        ("ppmi", "AXIAL_T2_FLAIR", "FLAIR"),
        ("ppmi", "AX_T2_FSE", "T2"),
        ("ppmi", "2D_GRE-MT", "susceptibility"),
        ("ppmi", "2D_DIFFUSION_AX_-_GATED", "diffusion"),
        ("ppmi", "PD-T2_TSE", "proton_density"),
        ("ppmi", "Phantom", "calibration"),
        ("ppmi", "QX-17", "unknown_sequence"),
        ("adni", "MP-RAGE_REPEAT", "T1"),
        ("adni", "IR-SPGR", "T1"),
        ("adni", "MT1__GradWarp__N3m", "T1"),
        ("adni", "Hippocampal_Mask", "label"),
        ("adni", "T2-weighted_FSE", "other_sequence"),
    ],
)
def test_a_series_of_loni_is_what_its_description_says(tmp_path, cohort, description, expected):
    folder = tmp_path / f"LONI/100_S_0001/{description}/2010-01-01_00_00_00.0/I1"
    folder.mkdir(parents=True)
    (folder / "scan.nii").touch()
    (found,) = find_candidates([str(tmp_path / "LONI")], out_dir=tmp_path / "out", cohort=load_cohort(cohort))
    scan = found.scan
    assert (scan.reason.partition(":")[0] if scan.status == "skipped" else scan.sequence) == expected


def test_no_image_is_opened_or_asked_for_its_size(tmp_path, monkeypatch):
    make_tree(tmp_path / "data", TREES["adni"])

    def refuse(self, *arguments, **options):
        raise AssertionError(f"{self} is opened")

    cohort = load_cohort("adni")
    asked = []
    stat = Path.stat
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "stat", lambda self, **options: asked.append(self.suffix) or stat(self, **options))
    assert len(find_candidates([str(tmp_path / "data")], out_dir=tmp_path / "out", cohort=cohort)) == len(TREES["adni"])
    assert ".nii" not in asked and ".dcm" not in asked
