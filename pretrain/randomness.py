"""Random generators that depend on nothing but the seed, the iteration and the purpose of the draw.

A run that is killed and resumed repeats the same draws without having saved any generator state.
"""

import hashlib

import numpy as np
import torch


def derived_seed(seed: int, index: int, purpose: str) -> int:
    """A 63-bit integer determined by the run's seed, an iteration (or epoch) and a purpose such as "crops"."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def numpy_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """The NumPy generator of one purpose in one iteration (or epoch)."""
    return np.random.default_rng(derived_seed(seed, index, purpose))


def torch_generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """The torch generator (on the CPU) of one purpose in one iteration."""
    return torch.Generator().manual_seed(derived_seed(seed, index, purpose))
