"""What the ranks of a plain script must agree on. Numbers and texts as tensors: torch's own way for objects is pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from stormjib_checkpoint.proof import MODULUS
from stormjib_checkpoint.tensors import memory

if TYPE_CHECKING:
    from collections.abc import Sequence


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


class World:
    """All ranks of the job, or the only one, as those who load together (`proof.Group`)."""

    def __init__(self) -> None:
        self.member, self.size = place()

    def summed(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all ranks, modulo 2^64."""
        return [
            number % MODULUS for number in self._reduced([_signed(n) for n in numbers], dist.ReduceOp.SUM)
        ]

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """The highest of all ranks."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        """The numbers of each rank."""
        if self.size == 1:
            return [list(numbers)]
        most = self.highest([len(numbers)])[0]
        own = torch.tensor([len(numbers), *numbers, *[0] * (most - len(numbers))], device=_device())
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own)
        return [row[1 : 1 + row[0]] for row in (one.tolist() for one in every)]

    def swapped(self, outgoing: Sequence[bytes | bytearray], incoming: Sequence[int]) -> list[memoryview]:
        """Bytes to each rank, and from each."""
        if self.size == 1:
            return [memoryview(own) for own in outgoing]
        sent = torch.frombuffer(bytearray().join(outgoing) or bytearray(1), dtype=torch.uint8)
        sizes = [len(one) for one in outgoing]
        got = torch.empty(sum(incoming), dtype=torch.uint8, device=_device())
        dist.all_to_all_single(got, sent[: sum(sizes)].to(_device()), list(incoming), sizes)
        return [memory(part) for part in torch.split(got.cpu(), list(incoming))]

    def _reduced(self, numbers: Sequence[int], how: dist.ReduceOp.RedOpType) -> list[int]:
        if self.size == 1 or not numbers:
            return list(numbers)
        both = torch.tensor(numbers, dtype=torch.int64, device=_device())
        dist.all_reduce(both, how)
        return both.tolist()


def _signed(number: int) -> int:
    """The same 64 bits as torch's integers have them: their sums wrap around just so."""
    return number - MODULUS if number >= MODULUS // 2 else number


def _device() -> torch.device:
    backend = dist.get_backend()
    return torch.device("cpu") if "gloo" in backend else torch.device("cuda", torch.cuda.current_device())
