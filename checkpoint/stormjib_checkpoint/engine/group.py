"""What the ranks of a plain script must agree on. Numbers and texts as tensors: torch's own way for objects is pickle."""

from __future__ import annotations

import torch
import torch.distributed as dist


def place() -> tuple[int, int]:
    """Rank and world size; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_rank_0(text: str) -> str:
    """A text of rank 0, on every rank."""
    if not dist.is_initialized():
        return text
    data = text.encode()
    length = torch.tensor(len(data), device=_device())
    dist.broadcast(length, src=0)
    note = torch.zeros(int(length.item()), dtype=torch.uint8)
    if len(data) == len(note):
        note = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else note
    note = note.to(_device())
    if len(note):
        dist.broadcast(note, src=0)
    return bytes(note.tolist()).decode()


def all_agree(yes: bool) -> bool:
    """Whether every rank says yes."""
    if not dist.is_initialized():
        return yes
    votes = torch.tensor(int(yes), device=_device())
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes.item())


def _device() -> torch.device:
    backend = dist.get_backend()
    return torch.device("cpu") if "gloo" in backend else torch.device("cuda", torch.cuda.current_device())
