"""Counter-based randomness: every draw is a function of (seed, stream name, step, position), on any machine.

numpy's Philox is keyed by (seed, name) and its counter is set to (step, position), so a worker makes exactly its slice
of the global batch and nothing depends on what was drawn before (architecture.md §1.1). No generator has a state.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_WORDS = 4  # uint64 words that one Philox counter value gives


def uniform(seed: int, stream: str, step: int, lo: int, hi: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Uniform draws in (0, 1) for global positions lo … hi-1 at `step`: float64, (hi - lo, *shape)."""
    size = math.prod(shape)
    blocks = -(-size // _WORDS)  # counter values that belong to one position
    bits = np.random.Philox(key=_key(seed, stream), counter=[lo * blocks, step, 0, 0])
    words = bits.random_raw((hi - lo) * blocks * _WORDS).reshape(hi - lo, blocks * _WORDS)[:, :size]
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5).reshape(hi - lo, *shape) * 2.0**-53


def normal(seed: int, stream: str, step: int, lo: int, hi: int, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Standard normal draws, float32, (hi - lo, *shape): the inverse distribution function of `uniform`."""
    from scipy.special import ndtri

    return ndtri(uniform(seed, stream, step, lo, hi, shape)).astype(np.float32)


def permuted(seed: int | str, positions: np.ndarray, n: int) -> np.ndarray:
    """The data index at each position q of the endless stream: permutation(seed, q // n)[q mod n], O(1) memory.

    A word for `seed` gives an order that no experiment's own seed gives.

    A four-round Feistel network on the next even power of two, walked until it lands below n (at most four times
    as often as needed on average): a bijection of 0 … n-1 for every epoch.
    """
    positions = np.asarray(positions, dtype=np.uint64)
    epochs, index = positions // np.uint64(n), positions % np.uint64(n)
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    words = np.frombuffer(hashlib.blake2b(f"{seed}/index".encode(), digest_size=32).digest(), dtype=np.uint64)
    keys = [_mix(word ^ _mix(epochs)) for word in words]  # round keys of each position's epoch
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = index >> half, index & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        index = np.where(outside, (left << half) | right, index)
        outside = index >= n
    return index.astype(np.int64)


def _key(seed: int, stream: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), dtype=np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (the constants of splitmix64): every input bit reaches every output bit."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
