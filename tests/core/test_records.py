"""Small records: what is read, and what is said of files that are none."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from braindino.records import read_json, read_json_list, read_yaml


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_an_object_a_list_and_settings_are_read(tmp_path: Path) -> None:
    assert read_json(written(tmp_path / "a.json", '{"name": "Zürich", "n": 2}'.encode())) == {"name": "Zürich", "n": 2}
    assert read_json_list(written(tmp_path / "b.json", b"[1, null]")) == [1, None]
    assert read_yaml(written(tmp_path / "c.yaml", b"lr: 0.1\nsizes: [96, 48]\n")) == {"lr": 0.1, "sizes": [96, 48]}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_json, b'{"name": ', "is not JSON in UTF-8: Expecting value: line 1"),
        (read_json, b"", "is not JSON in UTF-8"),
        (read_json, b'{"name": "\xff"}', "is not JSON in UTF-8: 'utf-8' codec"),
        (read_json, b"[]", "found list; expected a JSON object"),
        (read_json_list, b"{}", "found dict; expected a JSON list"),
        (read_yaml, b"a: [1", "is not YAML in UTF-8: while parsing"),
        (read_yaml, b"a: !!python/object/apply:os.system [ls]", "is not YAML in UTF-8: could not determine"),
        (read_yaml, b"", "found NoneType; expected settings as `name: value`"),
        (read_yaml, b"- a\n", "found list; expected settings"),
    ],
)
def test_another_file_is_named_in_one_line(read: Callable, content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "record", content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")) as caught:
        read(path)
    assert "\n" not in str(caught.value)
