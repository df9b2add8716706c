"""What series are called at real consoles, and what each of them is."""

from dataclasses import dataclass, field

import pytest

from braindino.preprocessing.cohort_table import load_cohort
from braindino.preprocessing.sequence_rules import (
    MIN_IMAGES,
    T1_UNDECIDED,
    classify,
    decide_contrast,
    has_agent,
    plain_description,
    weighting_of,
)


@dataclass(frozen=True)
class Named:
    description: str = ""
    modality: str = "MR"
    num_images: int = 30
    tags: dict[str, str] = field(default_factory=dict)
    order: tuple[str, int] = ("", 0)


def times(tr: object, te: object, ti: object = "", technique: str = "SE") -> dict[str, str]:
    return {
        "RepetitionTime": str(tr),
        "EchoTime": str(te),
        "InversionTime": str(ti),
        "ScanningSequence": technique,
    }


def outcome(series: Named, *rules: object) -> str:
    verdict = classify(series, rules)
    assert bool(verdict.sequence) != bool(verdict.skip)
    return verdict.sequence or verdict.skip.partition(":")[0]


# Spellings of TCIA's clinical collections, ReMIND, Meningioma-SEG-CLASS, ACRIN, ADNI, PPMI and ICBM, and of the makers'
# own protocols.
DESCRIPTIONS = {
    T1_UNDECIDED: [
        "AX T1", "SAG T1 FLAIR", "t1_mprage_sag_p2_iso", "t1_mpr_ns_sag_p2_iso", "MPRAGE_GRAPPA", "MPRAGE GRAPPA_ND",
        "SAG_T1_3D_FSPGR", "3D_T1-weighted", "3D T1-weighted", "SAG_FSPGR_3D", "AX_T1_FSPGR", "sT1W_3D_TFE",
        "Sag MPRAGE GRAPPA", "MPRAGE Repeat", "rpt_MPRAGE", "SAG 3D SPGR", "IR-FSPGR", "MP-RAGE REPEAT",
        "MPR; ; N3; Scaled", "MPR; GradWarp; B1 Correction; N3; Scaled", "MPR-R; GradWarp; N3",
        "Accelerated Sagittal MPRAGE", "Accelerated Sag IR-FSPGR", "Sagittal 3D Accelerated MPRAGE", "AXT1",
        "SAG T1 POST-OP", "T1 SE EXTENDED", "AX BRAVO", "AX LAVA", "MP2RAGE_UNI", "PRE AND POST T1", "T1 AX SE 3MM",
        "3D SPGR AX", "AX  FSPGR 3D", "t1_fl2d_tra", "3D BRAVO STEALTH", "T1 TRA", "T1 SAG MPR", "MT1; GradWarp; N3m",
        "MPRAGE SENSE2", "Accelerated SAG IR-SPGR", "T1-anatomical", "T1 REPEAT", "AX T1 W/WO", "COR T1 W/O FS",
        "T1W_SE", "sT1W/3D/TFE/ISO", "T1 Pre-op", "AX T1 PRE/POST GAD", "3D T1 2 FA", "t1_mpr_cor", "PJN:AX T1",
        "ORIG T1 AX",
    ],
    "T1": [
        "AX T1 PRE GD", "AX T1 W/O", "AX T1 W/O CONTRAST", "AX T1 C-", "AX T1 FLAIR PRE", "3D_AX_T1_precontrast",
        "AXT1PRE", "AX T1 PRE-GD FLAIR", "T1 AX WITHOUT", "AX T1 WO", "AX T1 NON CONTRAST", "AX T1 NONCONTRAST",
        "AX T1 NO GAD", "AX T1 PRECONTRAST", "AX T1 UNENHANCED", "T1 NATIV TRA", "T1 PRE BRAVO",
    ],
    "T1c": [
        "Ax T1 Post Gd", "AX T1 POST", "AX T1 POST-GAD", "AX T1 W CONTRAST", "AXIAL T1 WITH CONTRAST", "Ax T1 SE +C",
        "Ax T1 FSE C+", "T1 AX POST GD FS", "Sag T1 FLAIR +C", "t1_mpr_tra_iso_gad", "sT1W_3D_TFE +GD",
        "3D_AX_T1_postcontrast", "3D_COR_T1_postcontrast", "T1+Gd", "T1 + GD", "T1+C", "T1C", "T1CE", "T1GD",
        "AXT1POST", "COR T1 POST FS", "AX T1 GD POSTOP", "POST GAD T1 SAG", "T1 THIN SECT POST GAD", "AX 3D BRAVO +C",
        "3D FSPGR POST GAD", "Ax SPGR 3D VOLUME POST", "AX VIBE POST", "AX T1 POST GD FLAIR", "AX T1 GD",
        "T1-AX POST", "t1_se_tra KM", "t1_se_tra_+KM", "SAG VOL T1 POST", "STEALTH AX T1 POST", "gad ax t1",
        "t1+gd mprage", "T1 AX WITH", "AX T1 W/", "AX T1 W/GD", "BRAIN W/WO AX T1 POST", "AX T1 POSTCONTRAST",
        "AX T1 ENHANCED", "AX T1 W/O FAT SAT POST", "AX T1 FS GAD", "T1W/SE/GD", "T1_FFE_TRA_GD", "SAG CUBE T1 POST",
        "SPC T1 POST", "t1_space_sag_p2_iso post", "T1 PREOP GAD",
    ],
    "T2": [
        "AX T2", "AX T2 FSE", "FSE T2 AX", "t2_tse_tra_512", "3DSAGT2SPACE", "3D_AX_T2_SPACE", "2D_AX_T2_BLADE",
        "T2W_TSE", "T2-TSE T W", "AX FRFSE-XL T2", "AXT2", "Axial T2 TSE with Fat Sat", "AXIAL FSE T2 FS",
        "COR T2 FSE POST", "AX T2 FS POST GAD", "eT2 AX", "T2 TSE TRA FS", "T2 AXIAL PROPELLER", "PROPELLER T2",
        "t2_haste_tra",
    ],
    "FLAIR": [
        "Axial T2-FLAIR", "Sagittal 3D FLAIR", "AX FLAIR", "FLAIR_LongTR SENSE", "Ax T2 FLAIR Propeller",
        "T2W_FLAIR SENSE", "COR T2 FLAIR FS", "T2 FLAIR + C", "AX FLAIR POST", "t2_tirm_tra_dark-fluid",
        "t2_space_dark-fluid_sag", "2D_AX_T2_FLAIR", "3D_SAG_T2_FLAIR", "FLAIR T2 TRA", "Sagittal 3D 0.9 FLAIR",
        "AXIAL_FLAIR", "Ax T2 Flair", "FLAIR POST GAD COR", "CUBE T2 FLAIR", "Sag CUBE FLAIR +C",
        "t2_spc_da-fl_irprep_sag",
    ],
    "angiography": [
        "3D TOF MRA", "MRV 2D TOF", "COW",
    ],
    "calibration": [
        "Calibration Scan", "B1+ MAP", "FIELD MAP", "ASSET CAL", "B1-Calibration Body", "B1-calibration Head",
        "Field Mapping", "MPRAGE Phantom GRAPPA2", "Cal 8HRBRAIN",
    ],
    "derived_reformat": [
        "COR MPR", "SAG MPR", "MPR Range", "MPRAGE MPR COR", "MIP", "REFORMATTED", "T1 POST RECON",
        "COR MPRAGE REFORMAT", "SAG T1 MPRAGE MPR", "AX MPR T1 POST", "<MPR Thick Range>",
    ],
    "diffusion": [
        "Axial DTI", "AX DIFFUSION", "DWI", "Apparent Diffusion Coefficient (mm2/s)", "ADC",
        "ep2d_diff_3scan_trace_p2_ADC", "ep2d_diff_mddw_20_p2_FA", "ISOTROPIC IMAGE",
        "Exponential Apparent Diffusion Coefficient", "DTI 25 DIRECTIONS", "AX EP2D DIFF", "dwi-axials", "DTI_gated",
        "DTI_gated_ADC", "ADC (10^-6 mm²/s)", "dADC Map", "eADC", "TRACEW", "FA map",
    ],
    "functional": [
        "Axial rsfMRI (Eyes Open)", "MOTOR TASK", "BOLD finger tapping", "Axial MB rsfMRI (Eyes Open)",
        "ep2d_RESTING_STATE", "VEN_BOLD",
    ],
    "localiser": [
        "3 Plane Localizer", "LOCALIZER", "Loc", "3-PLANE LOC", "SCOUT", "AAHead_Scout_64ch", "3-plane localizer",
    ],
    "mask_or_roi": [
        "ROI MASK", "Mask",
    ],
    "not_an_image": [
        "SCREEN SAVE", "Screen Captures",
    ],
    "other_body_part": [
        "T1 C SPINE", "SAG CERVICAL",
    ],
    "other_weighting": [
        "STIR COR", "AX CISS", "FIESTA", "SAG CISS",
    ],
    "partial_coverage": [
        "HighResHippocampus", "COR T2 HIPPOCAMPUS", "AX T1 IAC", "COR T1 PITUITARY POST", "AX T1 ORBITS",
    ],
    "perfusion": [
        "Axial 3D PASL (Eyes Open)", "Perfusion_Weighted", "relCBF", "AX PERFUSION", "DSC PERFUSION", "ep2d_perf",
        "AX DCE", "Cerebral Blood Volume", "rCBV", "dynamic T1", "T1 DYNAMIC", "ASL", "3D pCASL", "DSC_T2star",
        "T1 DCE 3 deg FA",
    ],
    "phase": [
        "Pha_Images", "Filtered_phase",
    ],
    "proton_density": [
        "Axial PD/T2 FSE", "Axial PD-T2 TSE", "Double_TSE", "PD_TSE", "PD AX", "AX PD", "PROTON DENSITY",
        "AX_DUAL_TSE", "AX PD   5/1",
    ],
    "quantitative_map": [
        "MTR", "MT_ON", "T1 MAP", "T2 map", "MP2RAGE_INV1", "OSIPI T1 MAPPING",
    ],
    "segmentation": [
        "Tumor Segmentation",
    ],
    "spectroscopy": [
        "MRS", "PRESS 30", "SVS_SE_30", "CSI", "PROBE-P",
    ],
    "subtraction": [
        "SUB", "T1 SUBTRACTION", "Subtraction POST-PRE",
    ],
    "susceptibility": [
        "Axial T2 Star", "Axial T2-Star", "AX T2 GRE", "AX T2*", "AX T2* GRE", "T2_FL2D_TRA_HEMO", "Ax SWAN",
        "SWI_Images", "mIP_Images(SW)", "AX GRE", "AX GRADIENT ECHO", "T2 STAR", "AX MPGR", "2D GRE-NM",
        "2D GRE - MT", "Ax 3D SWAN", "T2W_FFE", "MAG SWI",
    ],
    "unknown_sequence": [
        "Mag_Images", "Average DC", "USpredura", "T3D Stealth", "STEALTH POST", "AX T1/T2", "AXIAL", "3D SAG",
        "AXIAL POST GAD", "POST CONTRAST AX", "HASTE", "MD", "rBV corrected", "Processed Images",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("description", "expected"),
    [(description, expected) for expected, group in DESCRIPTIONS.items() for description in group],
)
def test_a_description_tells_what_a_series_is(description, expected):
    assert outcome(Named(description)) == expected


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("3DSAGT2SPACE", "3d sag t2 space"),
        ("Ax_T1W+C", "ax t1+c"),
        ("T1-weighted 3D", "t1 3d"),
        ("sT1W_3D_TFE", "s t1 3d tfe"),
        ("AX T1 W/O  FS", "ax t1 without fs"),
        ("POST1", "post1"),
        ("COR T2*", "cor t2*"),
        ("brain w/wo", "brain"),
        ("T2STAR", "t2*"),
        ("\u00e9 \x00; rm -rf", "\u00e9 \x00 rm rf"),
    ],
)
def test_descriptions_are_brought_to_one_form(text, plain):
    assert plain_description(text) == plain


@pytest.mark.parametrize(
    ("modality", "code"),
    [
        ("CT", "other_modality"), ("PT", "other_modality"), ("US", "other_modality"), ("OT", "other_modality"),
        ("", "other_modality"), ("RTSTRUCT", "segmentation"), ("SEG", "segmentation"), ("REG", "not_an_image"),
        ("PR", "not_an_image"), ("KO", "not_an_image"), ("SR", "not_an_image"), ("MR", "T1c"),
    ],
)  # fmt: skip
def test_only_magnetic_resonance_is_taken_whatever_it_is_called(modality, code):
    stealth = load_cohort("men-seg-class").sequence_rules
    assert outcome(Named("AX T1 POST", modality)) == code
    assert outcome(Named("T3D STEALTH", modality), *stealth) == code


@pytest.mark.parametrize(
    ("image_type", "expected"),
    [
        ("ORIGINAL\\PRIMARY\\M\\ND\\NORM", "T2"),
        ("ORIGINAL\\PRIMARY\\M_SE\\M\\SE", "T2"),
        ("DERIVED\\SECONDARY", "T2"),
        ("DERIVED\\SECONDARY\\REFORMATTED\\AVERAGE", "derived_reformat"),
        ("DERIVED\\PRIMARY\\MPR\\ND\\NORM", "derived_reformat"),
        ("DERIVED\\SECONDARY\\PROJECTION IMAGE", "derived_reformat"),
        ("DERIVED\\PRIMARY\\MIN IP\\NONE", "derived_reformat"),
        ("ORIGINAL\\PRIMARY\\P\\ND", "phase"),
        ("ORIGINAL\\PRIMARY\\PHASE MAP\\P\\SE", "phase"),
        ("ORIGINAL\\PRIMARY\\LOCALIZER", "localiser"),
        ("DERIVED\\SECONDARY\\SUBTRACTION", "subtraction"),
        ("DERIVED\\PRIMARY\\DIFFUSION\\ADC\\ND", "diffusion"),
        ("DERIVED\\PRIMARY\\PERFUSION\\RELCBV", "perfusion"),
        ("DERIVED\\SECONDARY\\SCREEN SAVE", "not_an_image"),
        ("ORIGINAL\\PRIMARY\\M\\MOSAIC", "functional"),
    ],
)
def test_the_image_type_overrules_a_plain_name(image_type, expected):
    assert outcome(Named("AX T2", tags={"ImageType": image_type})) == expected


@pytest.mark.parametrize(
    ("description", "tags", "expected"),
    [
        ("AXIAL", times(9000, 120, 2250), "FLAIR"),
        ("AXIAL", times(500, 12), T1_UNDECIDED),
        ("AXIAL", times(5000, 100), "T2"),
        ("AXIAL", times(3000, 20), "proton_density"),
        ("3D SAG", times(2300, 2.98, 900, "GR\\IR"), T1_UNDECIDED),
        ("AX POST GAD", times(600, 10), "T1c"),
        ("AX WITHOUT", times(600, 10), "T1"),
        ("SAG FLAIR", times(2000, 10, 750), T1_UNDECIDED),
        ("SAG FLAIR", times(6000, 350, 2100), "FLAIR"),
        ("AXIAL", times(35, 20, "", "GR"), "unknown_sequence"),
        ("AXIAL", times(1200, 50), "unknown_sequence"),
        ("AXIAL", times("", "", ""), "unknown_sequence"),
        ("AXIAL", times("x", "nan", "inf"), "unknown_sequence"),
        ("", {"ProtocolName": "AX T2"}, "T2"),
        ("AX", {"ProtocolName": "AX T2"}, "unknown_sequence"),
    ],
)
def test_times_decide_where_the_description_says_nothing(description, tags, expected):
    assert outcome(Named(description, tags=tags)) == expected


def test_times_of_no_known_weighting_are_none():
    assert weighting_of({}) == "" and weighting_of(times(30, 5, "", "EP")) == ""


def test_a_few_images_are_no_volume_unless_nobody_counted():
    assert outcome(Named("AX T1 POST", num_images=MIN_IMAGES - 1)) == "too_few_slices"
    assert outcome(Named("AX T1 POST", num_images=MIN_IMAGES)) == "T1c"
    assert outcome(Named("AX T1 POST", num_images=0)) == "T1c"
    assert outcome(Named("LOC", num_images=3)) == "localiser"


def test_rules_of_a_cohort_come_first():
    rules = load_cohort("men-seg-class").sequence_rules
    assert outcome(Named("T3D Stealth"), *rules) == outcome(Named("AX STEALTH MPR"), *rules) == "T1c"
    assert outcome(Named("STEALTH FLAIR"), *rules) == "FLAIR"
    assert outcome(Named("SUV T2"), *load_cohort("acrin-fmiso-brain").sequence_rules) == "other_modality"
    assert outcome(Named("rCBV T1 ROI_1"), *load_cohort("acrin-dsc-mr-brain").sequence_rules) == "mask_or_roi"


def contrasts(*study: Named) -> list[str]:
    return [verdict.sequence for verdict in decide_contrast([(series, classify(series)) for series in study])]


def at(time: str, description: str, agent: str = "", number: int = 1) -> Named:
    return Named(description, tags={"ContrastBolusAgent": agent}, order=(time, number))


def test_a_t1_is_plain_where_nothing_speaks_of_contrast_agent():
    assert contrasts(at("1000", "AX T1"), at("1100", "SAG T1"), at("1200", "AX T2")) == ["T1", "T1", "T2"]


def test_the_header_tells_contrast_agent():
    assert contrasts(at("1000", "AX T1"), at("1100", "AX T1", "Magnevist")) == ["T1", "T1c"]
    for nothing in ("", "NONE", "no", "N/A", "0", "without contrast"):
        assert not has_agent({"ContrastBolusAgent": nothing})
    assert has_agent({"ContrastBolusAgent": "15 cc MAGNEVIST"})


def test_an_agent_entered_for_the_whole_examination_proves_nothing():
    study = [at("1000", "AX T1 PRE", "GAD"), at("1005", "SAG T1", "GAD"), at("1100", "AX T1 POST", "GAD")]
    assert contrasts(*study) == ["T1", "T1", "T1c"]


@pytest.mark.parametrize("given", ["AX T1 POST", "DSC PERFUSION", "T1 DCE"])
def test_what_follows_contrast_agent_has_it_and_what_came_before_has_not(given):
    study = [at("093000", "SAG T1"), at("100000", given), at("101500.5", "COR T1"), at("102000", "AX T2")]
    expected = ["T1", "T1c" if given == "AX T1 POST" else "", "T1c", "T2"]
    assert contrasts(*study) == expected
    assert contrasts(*reversed(study)) == expected[::-1]


def test_labelling_of_spins_is_no_contrast_agent():
    assert contrasts(at("1000", "3D pCASL"), at("1100", "AX T1")) == ["", "T1"]


def test_before_a_series_that_says_without_there_was_none():
    assert contrasts(at("1000", "AX T1", "GAD"), at("1100", "COR T1 PRE")) == ["T1", "T1"]


def test_numbers_stand_in_for_missing_times_and_without_either_nothing_is_concluded():
    study = [at("1000", "SAG T1", number=2), at("", "AX T1 POST", number=5), at("0900", "COR T1", number=7)]
    assert contrasts(*study) == ["T1", "T1c", "T1c"]
    assert contrasts(at("", "AX T1 POST", number=0), at("1000", "COR T1", number=9)) == ["T1c", "T1"]
