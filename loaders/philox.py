"""Philox4x32-10, a counter-based generator: random words as a pure function of (counter, key). Salmon et al. 2011."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: U32, key: tuple[int | U32, int | U32]) -> U32:
    """Four independent random words for each counter.

    counter: uint32 [..., 4]. key: two words, each an int in [0, 2**32) or uint32 that broadcasts against [...].
    Returns uint32 [..., 4]. Known answers: the kat_vectors file of the authors' library Random123.
    """
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (second >> _SHIFT) ^ c1 ^ k0, second & _LOW
        c2, c3 = (first >> _SHIFT) ^ c3 ^ k1, first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(words: U32) -> npt.NDArray[np.float64]:
    """Words as float64 in the open interval (0, 1), each the middle of its 2**-32 wide cell."""
    return (words.astype(np.float64) + 0.5) * 2.0**-32
