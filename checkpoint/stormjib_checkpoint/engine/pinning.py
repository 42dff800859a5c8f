"""Memory of the host that a device can copy to beside the processor."""

from __future__ import annotations

import torch


def pin(address: int, size: int) -> bool:
    """Let devices copy to this memory beside the processor; False where that is not allowed (it counts as locked memory)."""
    return int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) == 0  # type: ignore[no-untyped-call]


def unpin(address: int) -> None:
    """Take it back, before the memory is given back."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
