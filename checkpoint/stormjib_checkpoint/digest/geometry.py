"""Where the elements of a box lie in its atom, with as few sides as that can be said with. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stormjib_checkpoint.boxes import Box


class Geometry(NamedTuple):
    """Element (c, …) of the box has the index base + sum(c * stride) in the atom, all in elements. The last stride is 1."""

    sizes: tuple[int, ...]
    """Never none: a scalar has one side, of one element."""
    strides: tuple[int, ...]
    base: int


def geometry(shape: Sequence[int], box: Box) -> Geometry:
    """The geometry of a box of an atom: sides that lie one after the other are one side, so a box that is contiguous has one."""
    # From the last side on; each either goes on where those behind it end, or it jumps.
    sizes, strides, stride, base = [1], [1], 1, 0
    for length, size, offset in zip(reversed(shape), reversed(box.shape), reversed(box.offset), strict=True):
        base += offset * stride
        if stride == sizes[-1] * strides[-1]:
            sizes[-1] *= size
        elif size != 1:
            sizes.append(size)
            strides.append(stride)
        stride *= length
    return Geometry(tuple(reversed(sizes)), tuple(reversed(strides)), base)
