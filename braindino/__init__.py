"""BrainDINO: brain-MRI foundation models, from raw scans to slices, pretraining, segmentation and light heads.

The two functions most users want are re-exported here; they are resolved lazily so that ``import braindino`` stays
cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braindino.weights import load_encoder, save_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder", "save_encoder"]


def __getattr__(name: str) -> Any:
    if name in ("load_encoder", "save_encoder"):
        from braindino import weights

        return getattr(weights, name)
    raise AttributeError(f"module 'braindino' has no attribute {name!r}")
