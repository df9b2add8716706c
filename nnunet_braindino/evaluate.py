"""Dice and HD95 of predicted label maps, per case and region (paper sec. 4.3.1)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from braindino.process_map import map_in_processes
from braindino.resampling import draw_subjects, holm, percentile_interval
from braindino.segmentation_scores import Comparison, RegionSummary, SegmentationScores
from braindino.volume import Volume, load_labels, load_volume
from nnunet_braindino.folds import leaks_of_dataset
from nnunet_braindino.paired_tests import bootstrap_means, paired_test
from nnunet_braindino.predictions import PredictionSet, Regions, label_ratio
from nnunet_braindino.raw_dataset import FILE_ENDING
from nnunet_braindino.surface_distance import HD95_DEFINITION, diagonal_mm, dice, hd95

INTERVAL_NOTE = "95 % percentile bootstrap of the mean, subjects resampled, 2000 draws, seed 42"


@dataclass(frozen=True, kw_only=True)
class EmptyRules:
    """What holds where a mask is empty. One empty mask always means a Dice of 0."""

    both_empty: Literal["undefined", "perfect"] = "undefined"
    """Empty in prediction and reference: no Dice and no HD95, as nnU-Net has it; or Dice 1 and 0 mm, as BraTS has."""
    one_empty: Literal["diagonal", "undefined"] = "diagonal"
    """HD95 where one is empty: the diagonal of the image (373.13 mm in BraTS, as its organisers do), or none."""

    def notes(self) -> dict[str, str]:
        """In words, for the files of results."""
        both = "Dice 1, HD95 0 mm" if self.both_empty == "perfect" else "no Dice and no HD95, not counted in the means"
        one = "the diagonal of the image" if self.one_empty == "diagonal" else "none, not counted in the mean"
        return {
            "undefined": f"empty in both prediction and reference: {both}",
            "missed": f"empty in one of them: Dice 0; HD95 {one}",
        }


class CaseScores(NamedTuple):
    """Of one case."""

    case: str
    dice: dict[str, dict[str, float]]
    """Predictions -> region -> Dice."""
    hd95: dict[str, dict[str, float]]
    """Predictions -> region -> HD95 in mm."""
    floor: dict[str, float]
    """Region -> Dice of the whole brain; NaN where the region is absent."""


def score_predictions(
    sets: Sequence[PredictionSet],
    *,
    subject_of: Mapping[str, str],
    images: Path | None = None,
    rules: EmptyRules | None = None,
    pretraining_overlap: str,
    jobs: int = 1,
) -> dict[str, SegmentationScores]:
    """Scores of every set of predictions, by name, all on the same cases.

    Args:
        sets: of the same dataset, with different names.
        subject_of: case -> subject; a case that is missing there is a subject of its own.
        images: folder with nnU-Net's images; their non-zero voxels are the brain, which gives the trivial floor.
        rules: for empty masks.
        pretraining_overlap: stamp of the dataset.
        jobs: processes.

    Raises:
        ValueError: the sets differ in cases or regions, or a prediction is on another grid than its reference.
    """
    rules = rules or EmptyRules()
    notes = {"hd95": HD95_DEFINITION, "interval": INTERVAL_NOTE, **rules.notes()}
    cases, regions = _check_alike(sets)
    score = partial(
        score_case,
        files={each.name: each.files for each in sets},
        references=sets[0].references,
        regions=regions,
        images=images,
        rules=rules,
    )
    rows = list(map_in_processes(score, cases, jobs=jobs, desc="score"))
    subjects = [subject_of.get(case, case) for case in cases]
    draws = draw_subjects(subjects)
    leaks = leaks_of_dataset(sets[0].references.parent, cases, subject_of)
    if leaks:
        notes["time_points"] = (
            f"{len(leaks)} of {len(set(subjects))} subjects were also trained on, at another time point: too good on "
            f"them ({', '.join(leaks)})"
        )
    floors = {region: [row.floor.get(region, math.nan) for row in rows] for region in regions}
    scores = {}
    for each in sets:
        dices = {row.case: row.dice[each.name] for row in rows}
        distances = {row.case: row.hd95[each.name] for row in rows}
        scores[each.name] = SegmentationScores(
            cases=dices,
            summary={
                name: summarize([dices[case][name] for case in cases], draws=draws, floor=floors[name])
                for name in regions
            },
            pretraining_overlap=pretraining_overlap,
            hd95=distances,
            hd95_summary={name: summarize([distances[case][name] for case in cases], draws=draws) for name in regions},
            subject_of=dict(zip(cases, subjects, strict=True)),
            checkpoint=each.checkpoint,
            notes=notes,
        )
    return scores


def score_case(
    case: str,
    *,
    files: Mapping[str, Mapping[str, Path]],
    references: Path,
    regions: Regions,
    images: Path | None,
    rules: EmptyRules,
) -> CaseScores:
    """All predictions of one case against its reference.

    Args:
        case: nnU-Net's case identifier.
        files: predictions -> case -> label map.
        references: folder of reference label maps.
        regions: region -> label values.
        images: folder of nnU-Net's images, for the floor.
        rules: for empty masks.
    """
    reference_path = references / f"{case}{FILE_ENDING}"
    reference = _load_label_volume(reference_path)
    truth = {name: np.isin(reference.data, values) for name, values in regions.items()}
    dices, distances = {}, {}
    for name, paths in files.items():
        prediction = load_prediction(paths[case], reference, reference_path)
        pairs = {
            region: score_region(np.isin(prediction, regions[region]), mask, reference.spacing, rules)
            for region, mask in truth.items()
        }
        dices[name] = {region: pair[0] for region, pair in pairs.items()}
        distances[name] = {region: pair[1] for region, pair in pairs.items()}
    floor = {}
    if images is not None:
        brain = np.any([load_volume(channel).data != 0 for channel in channel_files(images, case)], axis=0)
        # Where a region is absent nothing is to be found, and the whole brain would score 0: not a fair floor.
        floor = {name: dice(brain, mask) if mask.any() else math.nan for name, mask in truth.items()}
    return CaseScores(case, dices, distances, floor)


def score_region(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float], rules: EmptyRules
) -> tuple[float, float]:
    """Dice and HD95 in mm of two masks, under the rules for empty ones."""
    found, there = bool(prediction.any()), bool(reference.any())
    if not found and not there:
        return (1.0, 0.0) if rules.both_empty == "perfect" else (math.nan, math.nan)
    if found != there:
        return 0.0, diagonal_mm(reference.shape, spacing) if rules.one_empty == "diagonal" else math.nan
    return dice(prediction, reference), hd95(prediction, reference, spacing=spacing)


def summarize(
    values: Sequence[float], *, draws: np.ndarray | None = None, floor: Iterable[float] = ()
) -> RegionSummary:
    """Mean, standard deviation and median of the values that are not NaN, and the mean of the floor's.

    Args:
        values: one per case.
        draws: from ``draw_subjects``, for the interval.
        floor: one per case.
    """
    every = np.asarray(values, dtype=np.float64)
    defined, floors = (np.array([v for v in numbers if not math.isnan(v)]) for numbers in (every.tolist(), floor))
    low, high = (math.nan, math.nan) if draws is None else percentile_interval(bootstrap_means(every, draws))
    return RegionSummary(
        mean=float(defined.mean()) if len(defined) else math.nan,
        sd=float(defined.std(ddof=1)) if len(defined) > 1 else math.nan,
        num_cases=len(defined),
        floor=float(floors.mean()) if len(floors) else math.nan,
        median=float(np.median(defined)) if len(defined) else math.nan,
        low=low,
        high=high,
    )


def compare(scores: Mapping[str, SegmentationScores]) -> list[Comparison]:
    """Paired tests of all pairs at the same label ratio, region by region; Holm over the regions and pairs of a
    metric.
    """
    pairs = [
        (first, second) for first, second in combinations(scores, 2) if label_ratio(first)[1] == label_ratio(second)[1]
    ]
    rows: list[Comparison] = []
    for metric in ("Dice", "HD95"):
        tested = []
        for first, second in pairs:
            subject_of = scores[first].subject_of
            for region in scores[first].summary:
                one, two = (
                    np.array([_table(scores[name], metric)[case][region] for case in subject_of])
                    for name in (first, second)
                )
                test = paired_test(one, two, list(subject_of.values()))
                tested.append(Comparison(metric, region, label_ratio(first)[1], first, second, **test._asdict()))
        by_bootstrap = holm([row.p_bootstrap for row in tested])
        by_flip = holm([row.p_sign_flip for row in tested])
        rows += [
            row._replace(p_bootstrap_holm=p, p_sign_flip_holm=q)
            for row, p, q in zip(tested, by_bootstrap, by_flip, strict=True)
        ]
    return rows


def channel_files(images: Path, case: str) -> list[Path]:
    """nnU-Net's images of a case, one file per channel, in their order.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(images.glob(f"{case}_[0-9][0-9][0-9][0-9]{FILE_ENDING}"))
    if not paths:
        raise ValueError(f"{images}: no image {case}_0000{FILE_ENDING}; expected nnU-Net's images of the scored cases")
    return paths


def load_prediction(path: Path, reference: Volume, reference_path: Path) -> np.ndarray:
    """A predicted label map, (X, Y, Z) in RAS+, on the grid of its reference.

    Raises:
        ValueError: it is on another grid.
    """
    prediction, affine = load_labels(path)
    if prediction.shape != reference.shape or not np.allclose(affine, reference.affine, atol=1e-3):
        raise ValueError(
            f"{path}: grid {prediction.shape} differs from that of {reference_path}, {reference.shape}, "
            "or lies elsewhere; predict from the images that the references belong to"
        )
    return prediction


def _load_label_volume(path: Path) -> Volume:
    if not path.is_file():
        raise ValueError(f"{path}: not there; expected a reference for every prediction (--references)")
    return Volume(*load_labels(path))


def _check_alike(sets: Sequence[PredictionSet]) -> tuple[list[str], Regions]:
    """The cases and regions that all sets share.

    Raises:
        ValueError: two sets have one name, or differ in references, cases or regions.
    """
    first = sets[0]
    names = [each.name for each in sets]
    if len(set(names)) != len(names):
        raise ValueError(f"predictions: two are called alike, {names}; tell them apart with --names")
    for each in sets[1:]:
        if each.references.resolve() != first.references.resolve():
            raise ValueError(f"{first.name} and {each.name} belong to {first.references} and {each.references}")
        if dict(each.regions) != dict(first.regions):
            raise ValueError(f"{first.name} and {each.name} have regions {first.regions} and {each.regions}")
        differ = sorted(first.files.keys() ^ each.files.keys())
        if differ:
            raise ValueError(
                f"{first.name} and {each.name}: {len(differ)} cases were predicted by one of them only, e.g. "
                f"{differ[0]}; score the same folds (--folds)"
            )
    return sorted(first.files), first.regions


def _table(scores: SegmentationScores, metric: str) -> Mapping[str, Mapping[str, float]]:
    return scores.cases if metric == "Dice" else scores.hd95
