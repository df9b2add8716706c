"""Reading the small tables and records of a project folder: TSV, JSON, YAML. Errors name the file."""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def read_tsv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a table with tabs.

    Raises:
        ValueError: the file is empty, or a row has more or fewer cells than the header.
    """
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle, delimiter="\t", restkey="\0", restval="\0")
        rows = list(reader)
    columns = list(reader.fieldnames or ())
    if not columns:
        raise ValueError(f"{path}: empty; expected a header line")
    for number, row in enumerate(rows, start=2):
        if "\0" in row or "\0" in row.values():
            raise ValueError(f"{path}, line {number}: expected {len(columns)} cells, as in the header")
    return columns, rows


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}; expected a JSON object")
    return value


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: found a {type(value).__name__}; expected settings by name")
    return value


def numbers(texts: Iterable[Any]) -> list[float]:
    """The finite numbers among ``texts``; anything else, such as BIDS's ``n/a``, is left out."""
    found = []
    for text in texts:
        try:
            found.append(float(text))
        except (TypeError, ValueError):
            continue
    return [number for number in found if math.isfinite(number)]
