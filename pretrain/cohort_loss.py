"""The DINO term of each cohort: which of the data the encoder finds hard, and which it has stopped learning from."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from braindino.manifest import Scan
from braindino.pretrain.distributed import all_reduce
from braindino.transfer import send

PREFIX = "dino_cohort/"


class CohortLoss:
    """Means per cohort since the last look, summed on the device: nothing waits for it in a step."""

    def __init__(self, scans: Sequence[Scan], scan_index: np.ndarray, device: torch.device) -> None:
        """
        Args:
            scans: of the store.
            scan_index: (num_slices,) row of each slice's scan.
            device: of the losses.
        """
        self.names = sorted({scan.cohort for scan in scans})
        codes = np.array([self.names.index(scan.cohort) for scan in scans], dtype=np.int64)
        self._codes = codes[scan_index]
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)

    def add(self, indices: np.ndarray, losses: Tensor) -> None:
        """Count the losses (B,) of slices, by their store indices (B,); those that are no numbers are left out."""
        cohorts = send(torch.from_numpy(self._codes[indices]), losses.device)
        finite = torch.isfinite(losses)
        values = torch.stack([torch.where(finite, losses, 0.0), finite.to(losses.dtype)]).to(self._sums.dtype)
        self._sums.index_add_(1, cohorts, values)

    def look(self) -> dict[str, float]:
        """``dino_cohort/NAME`` -> mean over all processes, for cohorts that were seen; then count anew.

        Empty for a store of one cohort, whose mean is the loss itself.
        """
        sums, counts = all_reduce(self._sums.clone()).tolist()
        self._sums.zero_()
        if len(self.names) < 2:
            return {}
        return {
            f"{PREFIX}{name}": total / count
            for name, total, count in zip(self.names, sums, counts, strict=True)
            if count
        }
