"""The README's commands run, in its order, on a cohort of three simulated subjects.

What would take days is replaced by its short form, word for word in ``SHORTENED``; the rest runs as it stands.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORTENED = {
    "--skull-strip hd-bet --jobs 4": "--skull-strip none --jobs 2",
    "pretrain/train.py stage1": f"{ROOT / 'pretrain' / 'train.py'} debug",
    "--encoder run/encoder --out": "--encoder run/encoder --options num_slices=4 --out",
    "--out eval --": "--out eval --ratios 1.0 --seeds 0 --",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    commands = re.findall(r"^make (\w+)", blocks("bash")[0], flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    for target in commands:
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert planned.stdout


def test_every_file_the_readme_points_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for code in re.findall(
        r"`((?:braindino|pretrain|preprocessing|downstream|simulation|report|viewer|nnunet_braindino)/[\w./]*)`", README
    ):
        assert (ROOT / code).exists(), code


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    run("braindino simulate --out scans --subjects 3 --seed 3 --jobs 2", folder)
    return folder


def run(script: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SCANS": str(folder / "scans"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_the_path_on_ones_own_data_runs_as_written(workplace: Path) -> None:
    script = blocks("bash")[2]
    for long, short in SHORTENED.items():
        assert long in script, f"README no longer says {long!r}"
        script = script.replace(long, short)
    # nnU-Net's own training has its end-to-end test in tests/nnunet; here its program must at least be found.
    segmentation = next(line for line in script.splitlines() if "nnUNetv2_train" in line)
    script = script.replace(segmentation, "nnUNetv2_train -h > /dev/null")
    assert re.fullmatch(
        r"BRAINDINO_ENCODER=run/encoder nnUNetv2_train \d+ 2d 0 -tr nnUNetTrainerBrainDINOFrozen", segmentation
    )
    run(script, workplace)
    assert (workplace / "prepared" / "scans.tsv").exists()
    assert (workplace / "eval" / "sequence" / "summary.tsv").exists()
    assert (workplace / "report" / "index.html").exists()

    printed = run(f"python - <<'END'\n{blocks('python')[0]}END\n", workplace)
    assert "torch.Size([1, 192])" in printed
