"""What `kernel.c` computes, in numpy: equal values, slowly, where nothing is compiled."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from stormjib_checkpoint.digest.definition import BLOCK, FAR, FIRST, GOLDEN, MASK, SECOND

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stormjib_checkpoint.digest.definition import Words
    from stormjib_checkpoint.digest.geometry import Geometry

    Numbers = NDArray[np.uint64]

AT_ONCE = 1 << 15
"""Elements; what is made on the way stays in a processor's cache."""


def partial(address: int, words: Words, box: Geometry, first: int, count: int) -> int:
    """As `native.partial`, for elements that are made of such words."""
    size, total = words.width * words.per_element, 0
    for start in range(0, count, AT_ONCE):
        upto = min(start + AT_ONCE, count)
        memory = memoryview((ctypes.c_char * ((upto - start) * size)).from_address(address + start * size))
        data = np.frombuffer(memory, np.dtype(f"<u{words.width}")).astype(np.uint64)
        total += int((data * _weights(_positions(words, box, first + start, first + upto))).sum())
    return total & MASK


def _positions(words: Words, box: Geometry, first: int, end: int) -> Numbers:
    """Of all words of these elements, one after the other."""
    number = np.arange(first, end, dtype=np.uint64)
    index = np.full(end - first, box.base, np.uint64)
    for size, stride in zip(reversed(box.sizes), reversed(box.strides), strict=True):
        number, along = np.divmod(number, np.uint64(size))
        index += along * np.uint64(stride)
    of_element = np.arange(words.per_element, dtype=np.uint64)
    return (index[:, None] * np.uint64(words.per_element) + of_element).reshape(-1)


def _weights(position: Numbers) -> Numbers:
    block, within = np.divmod(position, np.uint64(BLOCK))
    return _odd(within) * _odd(block + np.uint64(FAR))


def _odd(z: Numbers) -> Numbers:
    z = z * np.uint64(GOLDEN)
    z = (z ^ z >> np.uint64(30)) * np.uint64(FIRST)
    z = (z ^ z >> np.uint64(27)) * np.uint64(SECOND)
    return (z ^ z >> np.uint64(31)) | np.uint64(1)
