"""``braindino tasks [NAME]``: the table of tasks, or one row in full."""

import argparse
from collections.abc import Sequence

import yaml

from braindino.command_line import command_line
from braindino.downstream.scoring import check_metrics
from braindino.downstream.task_table import as_plain, load_task, task_names


@command_line("tasks")
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when there is no such task."""
    parser = argparse.ArgumentParser(prog="braindino tasks", description="What can be evaluated, and how.")
    parser.add_argument("task", nargs="?", metavar="TASK", help="a row, or a YAML file of your own: shown in full")
    arguments = parser.parse_args(argv)
    if arguments.task:
        task = load_task(arguments.task)
        check_metrics(task)
        print(yaml.safe_dump(as_plain(task), sort_keys=False, allow_unicode=True, width=110), end="")
    else:
        print(_overview())
    return 0


def _overview() -> str:
    header = ("task", "paper", "predicts", "from", "cohorts of the paper", "metric", "tested on")
    lines = [header]
    for name in task_names():
        task = load_task(name)
        tested = {"holdout": "one test set", "kfold": f"{task.protocol.num_splits} folds"}.get(
            task.protocol.kind, f"{task.protocol.num_splits} test sets"
        )
        cohorts, sequences = ", ".join(task.cohorts), ", ".join(task.inputs.sequences)
        lines.append((task.name, task.section, task.title, sequences, cohorts, task.metrics[0], tested))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    raise SystemExit(main())
