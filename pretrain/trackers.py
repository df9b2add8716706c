"""The rows of metrics.jsonl in TensorBoard, where it is installed, and in Weights & Biases, on request."""

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from braindino.atomic import write_text


class Trackers:
    """Programs that show a run while it goes on; a context manager. ``log`` takes rows as metrics.jsonl holds them."""

    def __init__(
        self,
        run_dir: Path,
        *,
        tensorboard: bool | None,
        wandb_project: str | None,
        config: Mapping[str, Any],
        start: int,
    ) -> None:
        """
        Args:
            run_dir: of the run; TensorBoard's files go to its folder tensorboard/.
            tensorboard: whether to write for TensorBoard; None: if it is installed.
            wandb_project: project of Weights & Biases; None: do not use it.
            config: resolved settings, shown beside the run.
            start: iterations done before; what was logged after them is superseded.

        Raises:
            ValueError: one that was asked for is not installed.
        """
        self._writer: Any = None
        self._wandb: Any = None
        if tensorboard is None:
            tensorboard = find_spec("tensorboard") is not None
        if tensorboard:
            _need("tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        if wandb_project is not None:
            _need("wandb", "--wandb-project")
            import wandb

            self._wandb = wandb.init(
                project=wandb_project,
                name=run_dir.name,
                dir=str(run_dir),
                config=dict(config),
                id=_wandb_id(run_dir),
                resume="allow",
            )

    def log(self, row: Mapping[str, Any]) -> None:
        """Show the numbers of a row."""
        iteration = int(row["iteration"])
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "iteration"}
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(numbers, step=iteration)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _need(package: str, flag: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{flag}: the package {package} is not installed; pip install {package}, or leave {flag} out")


def _wandb_id(run_dir: Path) -> str:
    """An id kept in the folder of the run, so that a resumed run goes on in the same chart."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
