"""Reading small records: a JSON or YAML file with one object. Errors name the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is no JSON in UTF-8, or not an object; names the file.
        OSError: it cannot be read.
    """
    return _checked(path, _parsed(path, json.loads, "JSON"), dict, "a JSON object")


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file; raises as ``read_json``."""
    return _checked(path, _parsed(path, json.loads, "JSON"), list, "a JSON list")


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings by name in a YAML file; raises as ``read_json``."""
    return _checked(path, _parsed(path, yaml.safe_load, "YAML"), dict, "settings as `name: value`")


def _parsed(path: Path, parse: Callable[[str], Any], what: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: is not {what} in UTF-8: {' '.join(str(error).split())}") from error


def _checked(path: Path, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{path}: found {type(value).__name__}; expected {expected}")
    return value
