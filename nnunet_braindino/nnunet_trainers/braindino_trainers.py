"""The only file in the folder that nnU-Net searches: it passes the names on to ``nnunet_braindino.trainer_variants``.

nnU-Net imports every module of an external trainer folder as a top-level module and forgets it afterwards. Here only
names pass through, while the classes stay importable and can be pickled.
"""

from nnunet_braindino.trainer_variants import find_trainer


def __getattr__(name: str) -> type:
    """nnU-Net asks for the trainer as an attribute of this module."""
    trainer = find_trainer(name)
    if trainer is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return trainer
