"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row the end of the run.

Everything is decided on the device. The host learns of it when it looks, as rarely as something is logged: asking at
every step would make it wait for the device.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from braindino.pretrain.data import BatchReader
from braindino.pretrain.distributed import all_reduce

MAX_SCANS_NAMED = 20


class Findings(NamedTuple):
    """What a look at the guard has shown."""

    skipped: list[int]
    """Iterations (from 0) since the last look that were skipped for their numbers."""
    total: int
    """Steps skipped in the whole run."""
    last_is_bad: bool
    """Whether the newest step was skipped, so that its terms are no numbers to log."""
    stop_at: int | None
    """First iteration of too many bad ones in a row, which is where the run has come to a stop; else None."""


class StepGuard:
    """Skips steps that are not finite. After more than `max_bad_steps` in a row every further step is skipped as well,
    until the host looks and stops: the weights are then still those of the last good step."""

    def __init__(self, max_bad_steps: int, device: torch.device) -> None:
        self.max_bad_steps = max_bad_steps
        # Skipped in all; in a row up to now; latch of "too many in a row".
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._pending: list[tuple[int, Tensor]] = []

    def check(self, iteration: int, loss: Tensor, norms: Tensor) -> Tensor:
        """1.0 if the step of this iteration must be skipped, else 0.0: a scalar on the device, alike in all processes.

        loss () of this process, norms (n,) of the gradients.
        """
        finite = torch.isfinite(loss.detach()).all() & torch.isfinite(norms).all()
        bad = all_reduce((~finite).float(), "max").long()
        total, row, latch = self._counts.unbind()
        total = total + bad * (1 - latch)
        row = (row + 1) * torch.maximum(bad, latch)
        latch = torch.maximum(latch, (row > self.max_bad_steps).long())
        skip = torch.maximum(bad, latch)
        self._counts = torch.stack([total, row, latch])
        self._pending.append((iteration, bad))
        return skip.float()

    def look(self) -> Findings:
        """What has happened since the last look. Waits for the device."""
        iterations = [iteration for iteration, _ in self._pending]
        numbers = torch.stack([*self._counts, *(bad for _, bad in self._pending)]).tolist()
        self._pending = []
        (total, row, latch), flags = numbers[:3], numbers[3:]
        return Findings(
            skipped=[iteration for iteration, bad in zip(iterations, flags, strict=True) if bad],
            total=total,
            last_is_bad=bool(row),
            stop_at=iterations[-1] - row + 1 if latch else None,
        )

    def state_dict(self) -> dict[str, int]:
        """For the checkpoint: after too many in a row, of the state before them. Waits for the device."""
        total, row, latch = self._counts.tolist()
        return {"total": total - (self.max_bad_steps + 1) * latch, "in_a_row": row * (1 - latch)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting; the row too, so that a run that keeps being interrupted does not pass for a good one."""
        self._counts = self._counts.new_tensor([state["total"], state["in_a_row"], 0])


def suspects(reader: BatchReader, iteration: int) -> str:
    """The scans to look at after an iteration (from 0) that was not finite, for a message.

    Those whose slices hold values that are not finite when there are any; else those of the whole global batch.
    """
    scans = reader.scans_of(iteration)
    broken = [not np.isfinite(slice_).all() for slice_ in reader.slices_of(iteration)]
    if any(broken):
        scans, what = [scan for scan, bad in zip(scans, broken, strict=True) if bad], "scans with values not finite"
    else:
        what = "all its slices are finite; its scans"
    paths = list(dict.fromkeys(scan.path for scan in scans))
    more = f" and {len(paths) - MAX_SCANS_NAMED} more" if len(paths) > MAX_SCANS_NAMED else ""
    return f"{what}: {', '.join(paths[:MAX_SCANS_NAMED])}{more}"
