"""Reading the small records of a project folder: JSON, YAML. Errors name the file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


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
