"""What the encoder has learnt so far, asked of a fixed set of slices: which sequence is this?

Sequence types are labels that every store has for free. Slices of half of the subjects are a memory, those of the other
half are asked: the label of a slice is the one that most of its nearest neighbours in the memory have (cosine; among
labels with equally many, the larger summed similarity, paper sec. 4.6). Beside it stand the same question asked of raw
intensities, and the floor: always saying what is most frequent in the memory.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from braindino.manifest import UNKNOWN_SEQUENCE
from braindino.pretrain.randomness import numpy_generator
from braindino.slice_store import SliceStore
from braindino.splits import split_subjects
from braindino.vision_transformer import VisionTransformer

# Slices as 32 x 32 means: what intensities alone tell.
COARSE = 32
MIDDLE = 128
_BATCH = 32


class KnnProbe:
    """Nearest-neighbour accuracy for the sequence type, on slices near the middle of the brain."""

    def __init__(self, store: SliceStore, usable: np.ndarray, *, num_slices: int, k: int, seed: int) -> None:
        """
        Args:
            store: the store that is learnt from.
            usable: indices of its slices that the run may see.
            num_slices: at most so many are looked at, from as many scans as possible.
            k: neighbours.
            seed: chooses scans and subjects.

        Raises:
            ValueError: see :func:`why_not`.
        """
        reason = why_not(store, usable)
        if reason:
            raise ValueError(f"no kNN probe: {reason}")
        self.k = k
        indices = _choose(store, usable, num_slices, seed)
        scans = [store.scan_of(int(index)) for index in indices]
        subjects = sorted({scan.subject_key for scan in scans})
        asked = set(split_subjects(subjects, test_fraction=0.5, seed=seed)[1])
        self._is_asked = torch.tensor([scan.subject_key in asked for scan in scans])
        names = sorted({scan.sequence for scan in scans})
        self._labels = torch.tensor([names.index(scan.sequence) for scan in scans])
        self._slices = torch.from_numpy(np.stack([store.read_float16(int(index)) for index in indices]))[:, None]
        memory, asked_for = self._labels[~self._is_asked], self._labels[self._is_asked]
        most = int(torch.bincount(memory).argmax())
        self.floor = float((asked_for == most).float().mean())
        coarse = F.adaptive_avg_pool2d(self._slices.float(), COARSE).flatten(1)
        self.intensity = self._accuracy(coarse - coarse.mean(dim=0))[0]

    def measure(self, encoder: VisionTransformer, device: torch.device) -> dict[str, float]:
        """Accuracy of the encoder's CLS features, mean cosine distance to the nearest neighbour, and both references.

        The encoder is left in the mode in which it came; no random number is drawn.
        """
        training = encoder.training
        encoder.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            features = torch.cat([encoder(part.to(device).float()).cls.float() for part in self._slices.split(_BATCH)])
        encoder.train(training)
        # Features of an untrained encoder share nearly all of their direction; what tells them apart is the rest.
        accuracy, distance = self._accuracy((features - features.mean(dim=0)).cpu())
        return {
            "probe_knn_sequence": accuracy,
            "probe_knn_sequence_intensity": self.intensity,
            "probe_knn_sequence_floor": self.floor,
            "probe_neighbour_distance": distance,
        }

    def _accuracy(self, features: Tensor) -> tuple[float, float]:
        unit = F.normalize(features, dim=1)
        similarity = unit[self._is_asked] @ unit[~self._is_asked].T
        nearest = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
        labels = self._labels[~self._is_asked][nearest.indices]
        of_label = F.one_hot(labels, int(self._labels.max()) + 1)
        votes, similarities = of_label.sum(dim=1), (of_label * nearest.values[..., None]).sum(dim=1)
        most = votes == votes.max(dim=1, keepdim=True).values
        said = similarities.masked_fill(~most, -torch.inf).argmax(dim=1)
        accuracy = (said == self._labels[self._is_asked]).float().mean()
        return float(accuracy), float((1 - nearest.values[:, 0]).mean())


def why_not(store: SliceStore, usable: np.ndarray) -> str:
    """What keeps the probe from being made of this store; empty where nothing does."""
    scans = [store.scans[row] for row in np.unique(store.scan_index[usable])]
    known = [scan for scan in scans if scan.sequence != UNKNOWN_SEQUENCE]
    if len({scan.sequence for scan in known}) < 2:
        return "the slices are of fewer than two known sequences"
    if len({scan.subject_key for scan in known}) < 4:
        return "the slices are of fewer than four subjects"
    return ""


def _choose(store: SliceStore, usable: np.ndarray, num_slices: int, seed: int) -> Sequence[int]:
    """Slices nearest to the middle of their scans, one of each scan in turn."""
    by_scan: dict[int, list[int]] = {}
    for index in usable[np.argsort(store.scan_index[usable], kind="stable")]:
        by_scan.setdefault(int(store.scan_index[index]), []).append(int(index))
    rows = [row for row in by_scan if store.scans[row].sequence != UNKNOWN_SEQUENCE]
    rows = [rows[i] for i in numpy_generator(seed, 0, "probe").permutation(len(rows))][:num_slices]
    ordered = [sorted(by_scan[row], key=lambda index: abs(store.position_of(index) - MIDDLE)) for row in rows]
    each = -(-num_slices // len(rows))
    chosen = [indices[turn] for turn in range(each) for indices in ordered if turn < len(indices)]
    return sorted(chosen[:num_slices])
