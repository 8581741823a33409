"""CRC-32C (Castagnoli; RFC 3720, appendix B.4) of large buffers in NumPy, and the form in which TensorFlow keeps it."""

# K 4-byte words of a buffer, level n: words that stand for 2^n words each

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]

_POLYNOMIAL = 0x82F63B78  # bit 31 is x^0: the first bit of a message is the highest power
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes | memoryview | npt.NDArray[np.uint8]) -> int:
    """CRC-32C of `data`, 0 to 2^32 - 1, at some 100 MB/s or more.

    A CRC is the remainder of a polynomial over GF(2), and so linear: neighbouring words are folded pairwise,
    left * x^(bits of the right) + right, level by level until one is left. x^n times a word is two table look-ups.
    """
    count = len(data) // 4
    register = 0xFFFFFFFF
    if count:
        words_K = np.frombuffer(data, "<u4", count).astype(np.uint32)
        words_K[0] ^= np.uint32(register)
        low, high = _tables(0)  # the register runs 32 bits ahead of the message
        word = int(_fold(words_K))
        register = int(low[word & 0xFFFF] ^ high[word >> 16])
    for byte in bytes(data[4 * count :]):
        register = _times_x(register ^ byte, 8)
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """`crc` as LevelDB and TensorFlow write it, so that the CRC of data that holds CRCs stays a good one."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _fold(words_K: U32) -> np.uint32:
    level = 0
    while len(words_K) > 1:
        if len(words_K) % 2:
            words_K = np.concatenate([np.zeros(1, np.uint32), words_K])  # leading zeros leave a remainder as it is
        low, high = _tables(level)
        left, right = words_K[0::2], words_K[1::2]
        words_K = low[left & 0xFFFF] ^ high[left >> 16] ^ right
        level += 1
    return np.uint32(words_K[0])


@cache
def _tables(level: int) -> tuple[U32, U32]:
    """x^(32 * 2^level) times each 16-bit number, as the low and as the high half of a word: two uint32 [65536]."""
    if level == 0:
        images = np.array([_times_x(1 << bit, 32) for bit in range(32)], np.uint32)
    else:
        low, high = _tables(level - 1)
        once = np.concatenate([low[1 << np.arange(16)], high[1 << np.arange(16)]])
        images = low[once & 0xFFFF] ^ high[once >> 16]
    halves = []
    for half in (images[:16], images[16:]):
        table = np.zeros(1, np.uint32)
        for image in half:
            table = np.concatenate([table, table ^ image])
        halves.append(table)
    return halves[0], halves[1]


def _times_x(word: int, times: int) -> int:
    for _ in range(times):
        word = word >> 1 ^ (_POLYNOMIAL if word & 1 else 0)
    return word
