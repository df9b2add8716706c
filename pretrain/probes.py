"""What the encoder has learnt so far, asked of a fixed set of scans: which sequence is this, and what else is known.

A scan is the mean of the features of some of its slices, as in the paper (sec. 4.3). Sequence types are labels that
every store has for free; others come from label tables. Scans of half of the subjects are a memory, those of the other
half are asked; or those asked are named, and kept out of training. The class of a scan is the one that most of its
nearest neighbours in the memory have (cosine; among classes with equally many, the larger summed similarity, paper sec.
4.6); a number is their mean. Asked are the CLS token, and the mean of the patch tokens, which learn before it. Beside
each answer stand the same question asked of raw intensities, and the floor: always saying what is most frequent in the
memory, or its median.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from braindino.label_table import Label, labels_of, number_of, read_labels
from braindino.manifest import UNKNOWN_SEQUENCE, Scan
from braindino.pretrain.randomness import numpy_generator
from braindino.slice_store import SliceStore
from braindino.splits import split_subjects
from braindino.vision_transformer import VisionTransformer

SEQUENCE = "sequence"
# Slices as 32 x 32 means: what intensities alone tell.
COARSE = 32
# Of each scan, evenly over the middle half of those that it has in the store: four are too few, an accuracy changes by
# 0.1 and more with the choice (docs/pretraining.md).
SLICES_PER_SCAN = 12
# Numbers with more different values than this are ages and the like, not codes of classes.
MAX_NUMERIC_CLASSES = 10
MIN_SUBJECTS = 4
_BATCH = 32


class Question(NamedTuple):
    """Something that is known of some of the scans.

    Attributes:
        name: the metric it becomes: ``knn_NAME`` for classes (accuracy), ``mae_NAME`` for numbers (mean absolute
            error in the label's unit).
        known: (n,) bool, of which scans.
        is_asked: (n,) bool, which scans are asked; the others are the memory.
        answers: (n,) class numbers (int64) or numbers (float32); anything where unknown.
        intensity: what raw intensities reach.
        floor: what the most frequent class, or the median, of the memory reaches.
    """

    name: str
    known: Tensor
    is_asked: Tensor
    answers: Tensor
    intensity: float = float("nan")
    floor: float = float("nan")


class NothingToAskError(ValueError):
    """None of the questions can be asked of a store; says why."""


class KnnProbe:
    """Nearest-neighbour answers on scans, by slices from the middle half of each."""

    def __init__(
        self,
        store: SliceStore,
        usable: np.ndarray,
        *,
        num_scans: int,
        k: int,
        seed: int,
        labels: Mapping[str, Mapping[str, Label]] | None = None,
        asked: Collection[str] | None = None,
    ) -> None:
        """
        Args:
            store: the store that is learnt from.
            usable: indices of its slices that the run may see.
            num_scans: at most so many, drawn at random, are looked at.
            k: neighbours.
            seed: chooses scans and subjects.
            labels: further questions, name -> scan_id -> label, as :func:`read_probe_labels` gives them.
            asked: subjects (`cohort/subject`) that are asked, whose slices need not be usable; None: half of those of
                the usable slices.

        Raises:
            NothingToAskError: none of the questions can be asked; those that cannot beside others are in ``unasked``.
        """
        if asked is not None:
            held_out = np.array([scan.subject_key in set(asked) for scan in store.scans])
            usable = np.union1d(usable, np.flatnonzero(held_out[store.scan_index]))
        self.k = k
        self.unasked: list[str] = []
        """Questions that the store or the tables do not allow, and why."""
        scans = [store.scans[row] for row in np.unique(store.scan_index[usable])]
        named = {SEQUENCE: sequence_labels(scans), **(labels or {})}
        asked_of: dict[str, Mapping[str, Label]] = {}
        for name, known in named.items():
            if reason := why_not(scans, known):
                self.unasked.append(f"{name}: {reason}")
            else:
                asked_of[name] = known
        if not asked_of:
            raise NothingToAskError("; ".join(self.unasked))
        known_of = {scan.scan_id for scan in scans if any(scan.scan_id in known for known in asked_of.values())}
        self.indices = _choose(store, usable, known_of, num_scans, seed)
        """Slices that are looked at, scan by scan."""
        rows, self._scan_of_slice = np.unique(store.scan_index[self.indices], return_inverse=True)
        self.scans = [store.scans[row] for row in rows]
        """Their scans."""
        if asked is None:
            subjects = sorted({scan.subject_key for scan in self.scans})
            asked = split_subjects(subjects, test_fraction=0.5, seed=seed)[1]
        self.is_asked = torch.tensor([scan.subject_key in set(asked) for scan in self.scans])
        """Whether each is asked; the others are the memory."""
        self._slices = torch.from_numpy(np.stack([store.read_float16(index) for index in self.indices]))[:, None]
        coarse = self._by_scan(F.adaptive_avg_pool2d(self._slices.float(), COARSE).flatten(1))
        self.questions: list[Question] = []
        for name, known in asked_of.items():
            try:
                question = _question(name, [known.get(scan.scan_id) for scan in self.scans], self.is_asked)
            except ValueError as error:
                self.unasked.append(f"{name}: {error}")
                continue
            self.questions.append(
                question._replace(intensity=self._answer(question, coarse)[0], floor=_floor(question))
            )
        if not self.questions:
            raise NothingToAskError("; ".join(self.unasked))

    def measure(self, encoder: VisionTransformer, device: torch.device) -> dict[str, float]:
        """What the encoder's features reach in each question (CLS token; ``_patches``: mean of the patch tokens),
        both references, and the mean cosine distance of CLS tokens to the nearest neighbour, as rows of metrics name
        them.

        The encoder is left in the mode in which it came; no random number is drawn.
        """
        training = encoder.training
        encoder.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            tokens = (encoder(part.to(device).float()) for part in self._slices.split(_BATCH))
            both = [(part.cls.float(), part.patches.float().mean(dim=1)) for part in tokens]
        encoder.train(training)
        features, of_patches = (self._by_scan(torch.cat(parts).cpu()) for parts in zip(*both, strict=True))
        row: dict[str, float] = {}
        for question in self.questions:
            answer, distance = self._answer(question, features)
            row.setdefault("probe_neighbour_distance", distance)
            row |= {
                f"probe_{question.name}": answer,
                f"probe_{question.name}_patches": self._answer(question, of_patches)[0],
                f"probe_{question.name}_intensity": question.intensity,
                f"probe_{question.name}_floor": question.floor,
            }
        return row

    def _by_scan(self, features: Tensor) -> Tensor:
        """(scans, D) means of the slices' features (slices, D), centred: features of an untrained encoder share nearly
        all of their direction, and what tells scans apart is the rest."""
        scan = torch.from_numpy(self._scan_of_slice)
        means = features.new_zeros(len(self.scans), features.shape[1]).index_add_(0, scan, features)
        means = means / torch.bincount(scan)[:, None]
        return means - means.mean(dim=0)

    def _answer(self, question: Question, features: Tensor) -> tuple[float, float]:
        """Accuracy or mean absolute error, and the mean cosine distance to the nearest neighbour."""
        unit = F.normalize(features, dim=1)
        asked, memory = question.known & question.is_asked, question.known & ~question.is_asked
        similarity = unit[asked] @ unit[memory].T
        nearest = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
        answers = question.answers[memory][nearest.indices]
        truth = question.answers[asked]
        if answers.is_floating_point():
            result = (answers.mean(dim=1) - truth).abs().mean()
        else:
            of_class = F.one_hot(answers, int(question.answers.max()) + 1)
            votes, similarities = of_class.sum(dim=1), (of_class * nearest.values[..., None]).sum(dim=1)
            most = votes == votes.max(dim=1, keepdim=True).values
            result = (similarities.masked_fill(~most, -torch.inf).argmax(dim=1) == truth).float().mean()
        return float(result), float((1 - nearest.values[:, 0]).mean())


def sequence_labels(scans: Sequence[Scan]) -> dict[str, Label]:
    """scan_id -> sequence type, of the scans whose type is known."""
    return {scan.scan_id: Label(scan.sequence, scan.path) for scan in scans if scan.sequence != UNKNOWN_SEQUENCE}


def read_probe_labels(tables: Sequence[str], scans: Sequence[Scan]) -> dict[str, dict[str, Label]]:
    """Column -> scan_id -> label, of settings ``column=table`` (see :func:`braindino.label_table.read_labels`).

    Raises:
        ValueError: a setting has another form, a table cannot be read or lacks the column, or knows none of the scans.
    """
    read: dict[str, dict[str, Label]] = {}
    for setting in tables:
        column, equals, table = setting.partition("=")
        if not (column and equals and table) or column in (SEQUENCE, *read):
            raise ValueError(
                f"probe_labels: found {setting!r}; expected column=table, such as sex=participants.tsv, each column "
                f"once, and not {SEQUENCE!r}, which is asked anyhow"
            )
        labels = labels_of(scans, read_labels([Path(table)], column))
        if not labels:
            raise ValueError(
                f"probe_labels: {table} has a {column!r} for none of the scans; its subjects must be those of the "
                f"store, such as {scans[0].subject!r} of cohort {scans[0].cohort!r}"
            )
        read[column] = labels
    return read


def why_not(scans: Sequence[Scan], labels: Mapping[str, Label]) -> str:
    """What keeps a question from being asked of these scans; empty where nothing does."""
    known = [scan for scan in scans if scan.scan_id in labels]
    if len({labels[scan.scan_id].text for scan in known}) < 2:
        return "all known slices have one and the same answer" if known else "it is known of no slice"
    subjects = len({scan.subject_key for scan in known})
    if subjects < MIN_SUBJECTS:
        return f"it is known of {subjects} subjects, and {MIN_SUBJECTS} are needed"
    return ""


def _question(name: str, labels: Sequence[Label | None], is_asked: Tensor) -> Question:
    """Classes, or numbers where the labels are numbers with many different values.

    Raises:
        ValueError: memory or questions are empty, or the memory knows one class alone.
    """
    known = torch.tensor([label is not None for label in labels])
    texts = [label.text for label in labels if label is not None]
    values = sorted(set(texts))
    if len(values) > MAX_NUMERIC_CLASSES and np.isfinite([number_of(value) for value in values]).all():
        answers, kind = torch.tensor([float(label.text) if label else 0.0 for label in labels]), "mae"
    else:
        answers, kind = torch.tensor([values.index(label.text) if label else 0 for label in labels]), "knn"
    memory = answers[known & ~is_asked]
    if not (known & is_asked).any() or len(memory.unique()) < 2:
        raise ValueError("it is known of too few subjects for a memory with two answers and somebody to ask")
    return Question(f"{kind}_{name}", known, is_asked, answers)


def _floor(question: Question) -> float:
    memory = question.answers[question.known & ~question.is_asked]
    truth = question.answers[question.known & question.is_asked]
    if memory.is_floating_point():
        return float((truth - memory.median()).abs().mean())
    return float((truth == torch.bincount(memory).argmax()).float().mean())


def _choose(store: SliceStore, usable: np.ndarray, scan_ids: set[str], num_scans: int, seed: int) -> list[int]:
    """Slices from the middle half of ``num_scans`` scans, twelve of each where it has as many."""
    by_scan: dict[int, list[int]] = {}
    for index in usable[np.argsort(store.scan_index[usable], kind="stable")]:
        by_scan.setdefault(int(store.scan_index[index]), []).append(int(index))
    rows = [row for row in by_scan if store.scans[row].scan_id in scan_ids]
    rows = [rows[i] for i in numpy_generator(seed, 0, "probe").permutation(len(rows))]
    chosen: list[int] = []
    for row in rows[:num_scans]:
        ordered = sorted(by_scan[row], key=store.position_of)
        last = len(ordered) - 1
        chosen += [
            ordered[i] for i in np.unique(np.linspace(last / 4, 3 * last / 4, SLICES_PER_SCAN).round().astype(int))
        ]
    return sorted(chosen)
