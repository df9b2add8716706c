"""Both packages installed in both ways, in fresh environments: nnU-Net's own programs find the trainers."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import distribution
from pathlib import Path

import nnunetv2
import numpy as np
import pytest
import torch

from braindino import save_encoder
from braindino.vision_transformer import VisionTransformer
from braindino.volume import load_labels, save_array

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
OURS = ("braindino", "nnunet_braindino", "nnunetv2", "__editable__")
TRAINER = "nnUNetTrainerBrainDINOFrozen_r60_demo"


class Environment:
    """A fresh virtual environment with every package of this one but the two that are installed into it."""

    def __init__(self, folder: Path, sources: dict[str, Path], *, editable: dict[str, bool]) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=False)
        # A folder of links in place of a download of PyTorch; .pth files of this environment must not come along.
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for path in SITE.iterdir():
            if not path.name.startswith(OURS) and path.suffix != ".pth" and path.name != "__pycache__":
                (borrowed / path.name).symlink_to(path)
        site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        (site / "zz_borrowed.pth").write_text(f"{borrowed}\n")
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "BRAINDINO", "PYTHON"))
        }
        self.environment |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
        self.environment |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
        for name, source in sources.items():
            options = ["-e"] if editable[name] else []
            pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
            self.run("python", *pip, *options, source)

    def run(self, program: str, *arguments: object, code: int = 0, **more: str) -> str:
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)],
            env=self.environment | more,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


def copy_sources(folder: Path) -> dict[str, Path]:
    """Trees to install from: this project, and nnU-Net as it is installed here, with its own programs."""
    ours = folder / "braindino"
    kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo", "tests", "docs", "benchmarks")
    shutil.copytree(ROOT, ours, ignore=kept)
    theirs = folder / "nnunetv2"
    shutil.copytree(Path(nnunetv2.__path__[0]), theirs / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    found = distribution("nnunetv2")
    scripts = [f"{each.name} = {each.value}" for each in found.entry_points if each.group == "console_scripts"]
    (theirs / "setup.py").write_text(
        "from setuptools import find_namespace_packages, setup\n"
        f"setup(name='nnunetv2', version='{found.version}', packages=find_namespace_packages(include=['nnunetv2*']),\n"
        f"      package_data={{'': ['*']}}, entry_points={{'console_scripts': {scripts!r}}})\n"
    )
    return {"nnunetv2": theirs, "braindino": ours}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights") / "encoder"
    save_encoder(VisionTransformer(embed_dim=64, depth=4, num_heads=1, layer_scale_init=1.0), folder)
    return folder


def write_scans(folder: Path) -> None:
    for number in range(6):
        rng = np.random.default_rng(number)
        brain = np.zeros((40, 36, 6))
        brain[6:34, 6:30] = rng.normal(100, 10, size=(28, 24, 6))
        labels = np.zeros(brain.shape, np.uint8)
        labels[12:20, 10:20, 1:5] = 1
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        save_array(brain + 80 * labels, affine, folder / f"p{number}_t1.nii.gz", dtype=np.float32)
        save_array(labels, affine, folder / f"p{number}_seg.nii.gz", dtype=np.uint8)


def train_and_predict(environment: Environment, encoder: Path) -> None:
    """From scans to labels with nothing but installed programs; the encoder is gone for the prediction."""
    folder = environment.folder
    write_scans(folder / "scans")
    (folder / "test.txt").write_text("scans/p5\n")
    environment.run(
        *("braindino", "nnunet", "convert-pairs", "--images", f"{folder}/scans/*_t1.nii.gz"),
        *("--labels", f"{folder}/scans/*_seg.nii.gz", "--channels", "T1", "--label-names", "lesion"),
        *("--test-subjects", folder / "test.txt", "--dataset-id", 9, "--name", "Install"),
    )
    environment.run("nnUNetv2_plan_and_preprocess", "-d", 9, "-c", "2d", "-npfp", 1, "-np", 1)
    log = environment.run(
        "nnUNetv2_train", 9, "2d", 0, "-tr", TRAINER, "-device", "cpu", BRAINDINO_ENCODER=str(encoder)
    )
    assert "label ratio 0.6, 2 of 4 cases" in log and "WARNING: axial slices" not in log
    dataset = folder / "raw" / "Dataset009_Install"
    predict = ["-i", dataset / "imagesTs", "-d", 9, "-c", "2d", "-f", 0, "-tr", TRAINER, "-device", "cpu"]
    environment.run("nnUNetv2_predict", *predict, "-o", folder / "stock", "-npp", 1, "-nps", 1, "--disable_tta")
    model = folder / "results" / "Dataset009_Install" / f"{TRAINER}__nnUNetPlans__2d"
    environment.run("braindino", "segment", model, dataset / "imagesTs", folder / "ours", "--device", "cpu")
    stock, _ = load_labels(folder / "stock" / "p5.nii.gz")
    ours, _ = load_labels(folder / "ours" / "p5.nii.gz")
    np.testing.assert_array_equal(stock, ours)
    assert stock.any()


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ["regular", "editable"])
@pytest.mark.parametrize("ours", ["regular", "editable"])
def test_nnunets_programs_find_the_trainers(tmp_path: Path, encoder: Path, theirs: str, ours: str):
    sources = copy_sources(tmp_path / "sources")
    editable = {"nnunetv2": theirs == "editable", "braindino": ours == "editable"}
    environment = Environment(tmp_path, sources, editable=editable)

    # The real program goes as far as the missing data set; the trainer was found before.
    missing = environment.run("nnUNetv2_train", 777, "2d", 0, "-tr", TRAINER, "-device", "cpu", code=1)
    assert f"Using trainer '{TRAINER}' from" in missing
    assert re.search(r"Could not find a dataset with the ID 777", missing)
    stock = environment.run("nnUNetv2_train", 777, "2d", 0, "-device", "cpu", code=1)
    assert "Could not find a dataset with the ID 777" in stock, "nnU-Net's own trainer is found as ever"
    assert "usage: nnUNetv2_predict" in environment.run("nnUNetv2_predict", "-h")
    off = environment.run("nnUNetv2_train", 777, "2d", 0, "-tr", TRAINER, code=1, BRAINDINO_NO_NNUNET_HOOK="1")
    assert f"Could not find requested nnunet trainer {TRAINER}" in off

    report = environment.run("braindino", "doctor", BRAINDINO_ENCODER=str(encoder))
    for name, is_editable in editable.items():
        place = sources[name] if is_editable else environment.folder / "venv"
        kind = "editable" if is_editable else "regular"
        assert re.search(rf"{name} \d+\.\d+\.\d+, {kind} install, in {re.escape(str(place))}", report), report
    assert "nnUNetTrainerBrainDINOFrozen: nnU-Net finds it in nnunet_braindino.trainer" in report
    assert re.search(r"encoder: .*, sha256 [0-9a-f]{64}, from BRAINDINO_ENCODER", report)
    off = environment.run("braindino", "doctor", BRAINDINO_NO_NNUNET_HOOK="1")
    assert "start-up hook: switched off by BRAINDINO_NO_NNUNET_HOOK" in off
    assert "nnU-Net does not find it (nnUNet_extTrainer does not lead to it)" in off
    assert "encoder: none (BRAINDINO_ENCODER is not set" in off

    if (theirs, ours) == ("editable", "regular"):
        train_and_predict(environment, encoder)
    environment.run("python", "-m", "pip", "uninstall", "-q", "-y", "braindino")
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert not [path.name for path in site.iterdir() if "braindino" in path.name]
    assert sys.version_info[:2] == tuple(map(int, site.parent.name.removeprefix("python").split(".")))
