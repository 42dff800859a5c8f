"""Partial digests of elements in memory, by the compiled kernel beside this file (`kernel.c`), or by its twin where there is none."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

from stormjib_checkpoint.digest.definition import VERSION, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_checkpoint.digest.definition import Words
    from stormjib_checkpoint.digest.geometry import Geometry

    Kernel = Callable[[int, Words, Geometry, int, int], int]

LIBRARY = Path(__file__).with_name("kernel.so")
"""Made from `kernel.c` where the package is installed."""

_log = logging.getLogger(__name__)


def partial(address: int, dtype: str, geometry: Geometry, first: int, count: int) -> int:
    """The partial digest of `count` elements of a box, from its element number `first` on, row-major within the box.

    They lie one after the other from `address` on, which needs no alignment. Runs without the GIL.
    """
    return _kernel()(address, words(dtype), geometry, first, count)


@functools.cache
def _kernel() -> Kernel:
    try:
        return compiled(LIBRARY)
    except (OSError, AttributeError) as error:
        from stormjib_checkpoint.digest import twin

        _log.warning(
            "digests of tensors take about 100 times as long, because their compiled kernel cannot be used (%s); install gcc, "
            "and then this package again (in a checkout: make setup)",
            error,
        )
        return twin.partial


def compiled(library: Path) -> Kernel:
    """The kernel in `library`. Raises OSError where it cannot be loaded, AttributeError where it is of another version."""
    function = getattr(ctypes.CDLL(str(library)), f"stormjib_digest_{VERSION}")
    number, numbers = ctypes.c_uint64, ctypes.c_char_p
    function.argtypes = (ctypes.c_void_p, number, number, number, numbers, numbers, number, number, number)
    function.restype = number

    def kernel(address: int, words: Words, box: Geometry, first: int, count: int) -> int:
        sides = len(box.sizes)
        sizes, strides = pack(f"{sides}Q", *box.sizes), pack(f"{sides}Q", *box.strides)
        found: int = function(address, *words, sides, sizes, strides, box.base, first, count)
        return found

    return kernel
