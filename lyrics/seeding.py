"""Random streams keyed by names, so that a sample's draw does not depend on order, batch or process."""

import hashlib
import random

import numpy as np


def stable_seed(*keys: object) -> int:
    """A 63-bit seed from any printable keys, equal on every machine and in every process."""
    text = "\x1f".join(str(key) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def reseed(*keys: object) -> None:
    """Set the state of every global generator (torch's on all devices, NumPy's, Python's) by keys.

    Where this is done at each step, the step is all that a checkpoint has to hold of them.
    """
    import torch  # only here: streams by name do without it

    seed = stable_seed(*keys)
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def rng(*keys: object) -> np.random.Generator:
    """NumPy generator for e.g. `rng(seed, step, sample_id)`."""
    return np.random.default_rng(stable_seed(*keys))
