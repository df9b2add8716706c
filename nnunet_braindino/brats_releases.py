"""The BraTS releases as rows: how files are named, what label values mean, which regions they make.

Every release has the same four channels and the same three regions (paper sec. 4.3.1): whole tumor (WT), tumor core
(TC) and enhancing tumor (ET). They differ in names, in the value of enhancing tumour, and in whether a name carries a
time point.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_braindino.raw_dataset import Case, DatasetForm, Found, LeftOut

_SUFFIXES_2021 = {"T1": "t1", "T1c": "t1ce", "T2": "t2", "FLAIR": "flair"}
_SUFFIXES_2023 = {"T1": "t1n", "T1c": "t1c", "T2": "t2w", "FLAIR": "t2f"}
_ADULT = {1: "necrotic core", 2: "oedema or invaded tissue", 3: "enhancing tumor"}
_NON_ENHANCING = {1: "non-enhancing core", 2: "surrounding FLAIR hyperintensity", 3: "enhancing tumor"}
_CHILD = {1: "non-enhancing component (solid, cystic or necrotic)", 2: "oedema", 3: "enhancing tumor"}
_REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)}
_HINTS = {4: "4 is enhancing tumour in BraTS 2021, resection cavity or oedema in later challenges: another release"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """One published training set.

    Attributes:
        name: how users ask for it.
        folder: outermost folder as published; files are found by name, wherever below the source they lie.
        case: regular expression of a case's name, with the group ``patient``; what follows it is the time point.
        separator: between a case's name and a file's suffix.
        suffixes: sequence -> suffix, in the order of nnU-Net's channels.
        labels: value in the release's files -> what it means.
        regions: region -> values in the release's files, nested, the largest first.
        stored_as: value in the files -> value in the dataset, where nnU-Net's rule that labels be consecutive asks for
            another.
        hints: value that the release does not have -> what a file with it most likely is.
        num_labelled: cases with a label map.
        cohort: row of the cohort table, the part before the slash in lists of subjects.
        dataset: default of the rest of nnU-Net's dataset name.
        source: where this is from.
    """

    name: str
    folder: str
    case: str
    separator: str = "-"
    suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES_2023)
    labels: Mapping[int, str] = field(default_factory=lambda: _ADULT)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: _REGIONS)
    stored_as: Mapping[int, int] = field(default_factory=dict)
    hints: Mapping[int, str] = field(default_factory=lambda: _HINTS)
    num_labelled: int
    cohort: str
    dataset: str
    source: str

    @property
    def file(self) -> re.Pattern[str]:
        """Of a file's name: groups ``case``, ``patient`` and ``suffix``."""
        return re.compile(rf"(?P<case>{self.case}){re.escape(self.separator)}(?P<suffix>[a-z0-9]+)\.nii(?:\.gz)?")

    def form(self) -> DatasetForm:
        """What the release's cases are turned into, with the way back in dataset.json."""
        stored = {value: self.stored_as.get(value, value) for value in self.labels}
        note: dict[str, object] = {
            "release": f"BraTS {self.name}",
            "source": self.source,
            "labels": {str(stored[value]): meaning for value, meaning in self.labels.items()},
        }
        if self.stored_as:
            note["label_in_release"] = {str(stored[value]): value for value in self.labels}
            note["to_map_back"] = "; ".join(
                f"labels and predictions hold {new} where the release has {old}: write {old} for {new} before "
                "submitting predictions to it"
                for old, new in self.stored_as.items()
            )
        return DatasetForm(
            channels=tuple(self.suffixes),
            labels={name: tuple(stored[value] for value in values) for name, values in self.regions.items()},
            stored_as=self.stored_as,
            hints=self.hints,
            empty_allowed=False,
            note=note,
        )


RELEASES = {
    release.name: release
    for release in (
        Release(
            name="2021",
            folder="RSNA_ASNR_MICCAI_BraTS2021_TrainingData",
            case=r"(?P<patient>BraTS2021_\d{5})",
            separator="_",
            suffixes=_SUFFIXES_2021,
            labels={1: "necrotic core", 2: "oedema or invaded tissue", 4: "enhancing tumor"},
            regions={"whole tumor": (1, 2, 4), "tumor core": (1, 4), "enhancing tumor": (4,)},
            stored_as={4: 3},
            hints={3: "3 is enhancing tumour from BraTS 2023 on; BraTS 2021 writes 4: another release"},
            num_labelled=1251,
            cohort="brats2021",
            dataset="BraTS2021",
            source="Baid et al. 2021, arXiv:2107.02314",
        ),
        Release(
            name="2023-GLI",
            folder="ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData",
            case=r"(?P<patient>BraTS-GLI-\d{5})-\d{3}",
            num_labelled=1251,
            cohort="brats2023-gli",
            dataset="BraTS2023GLI",
            source="BraTS 2023 adult glioma, the cases of 2021 (Baid et al. 2021, arXiv:2107.02314)",
        ),
        Release(
            name="2023-MEN",
            folder="BraTS2023-MEN",
            case=r"(?P<patient>BraTS-MEN-\d{5})-\d{3}",
            labels=_NON_ENHANCING,
            num_labelled=1000,
            cohort="brats2023-men",
            dataset="BraTS2023MEN",
            source="LaBella et al. 2023, arXiv:2305.07642",
        ),
        Release(
            name="2023-MET",
            folder="ASNR-MICCAI-BraTS2023-MET-Challenge-TrainingData",
            case=r"(?P<patient>BraTS-MET-\d{5})-\d{3}",
            labels=_NON_ENHANCING,
            num_labelled=238,
            cohort="brats2023-mets",
            dataset="BraTS2023MET",
            source="Moawad et al. 2023, arXiv:2306.00838",
        ),
        Release(
            name="2023-PED",
            folder="ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData",
            case=r"(?P<patient>BraTS-PED-\d{5})-\d{3}",
            labels=_CHILD,
            num_labelled=99,
            cohort="brats2023-ped",
            dataset="BraTS2023PED",
            source="Kazerooni et al. 2023, arXiv:2305.17033",
        ),
        Release(
            name="2023-SSA",
            folder="ASNR-MICCAI-BraTS2023-SSA-Challenge-TrainingData_V2",
            case=r"(?P<patient>BraTS-SSA-\d{5})-\d{3}",
            num_labelled=60,
            cohort="brats2023-ssa",
            dataset="BraTS2023SSA",
            source="Adewole et al. 2023, arXiv:2305.19369",
        ),
        Release(
            name="2024-GoAT",
            folder="MICCAI2024-BraTS-GoAT-TrainingData-With-GroundTruth",
            case=r"(?P<patient>BraTS-GoAT-\d{5})",
            num_labelled=1351,
            cohort="brats2024-goat",
            dataset="BraTS2024GoAT",
            source="BraTS 2024 generalizability across tumors; the number of cases from the paper's 1080 + 271",
        ),
    )
}


def find_brats_cases(source: Path, release: Release, *, cohort: str) -> Found:
    """The cases of a release below ``source``, sorted; those that lack a file, or have one twice, are left out.

    Raises:
        ValueError: no file is named as in this release; says whether they are named as in another. Or no case has a
            label map.
    """
    files: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    patient_of: dict[str, str] = {}
    elsewhere: Counter[str] = Counter()
    for path in sorted(_walk(source)):
        match = release.file.fullmatch(path.name)
        if match is None:
            elsewhere.update(other.name for other in RELEASES.values() if other.file.fullmatch(path.name))
            continue
        files[match["case"]][match["suffix"]].append(path)
        patient_of[match["case"]] = match["patient"]
    others = "; ".join(f"{count} files are named as in --release {name}" for name, count in elsewhere.items())
    if not files:
        example = release.case.replace("(?P<patient>", "").replace(")", "").replace(r"\d{5}", "00000")
        example = example.replace(r"\d{3}", "000") + release.separator + release.suffixes["T1"]
        raise ValueError(
            f"{source}: no file of BraTS {release.name}; expected {release.folder} with names such as {example}.nii.gz"
            + (f". {others}" if others else "")
        )
    if not any("seg" in suffixes for suffixes in files.values()):
        raise ValueError(
            f"{source}: none of {len(files)} cases has a label map (*{release.separator}seg.nii.gz), e.g. "
            f"{min(files)}; nothing can be trained on or scored. Give the training set, {release.folder}"
        )
    cases, left_out = [], []
    for name, suffixes in sorted(files.items()):
        subject = f"{cohort}/{patient_of[name]}"
        needed = {**release.suffixes, "labels": "seg"}
        wrong = next((what for what, suffix in needed.items() if len(suffixes[suffix]) != 1), None)
        if wrong is None:
            images = tuple(suffixes[suffix][0] for suffix in release.suffixes.values())
            cases.append(Case(name=name, subject=subject, images=images, labels=suffixes["seg"][0]))
            continue
        paths = suffixes[needed[wrong]]
        code = "duplicate" if paths else "no_labels" if wrong == "labels" else "missing_channel"
        found = (
            ", ".join(str(path) for path in paths) or f"only {', '.join(sorted(s for s in suffixes if suffixes[s]))}"
        )
        reason = f"expected one {wrong} file ({needed[wrong]}); found {found}"
        left_out.append(LeftOut(name, subject, code, reason))
    return Found(cases, left_out, (f"{others}: not of this release, not converted",) if others else ())


def _walk(source: Path) -> Iterator[Path]:
    """Every file below a folder, through links to folders, each folder once.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected the unpacked training set")
    seen = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, name) for name in names)
