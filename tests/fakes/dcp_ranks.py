"""What a rank of a script that uses DCP does: FSDP2, torch's own state dicts, and one argument that is ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

from fakes.fsdp_ranks import build, dump, step
from stormjib_checkpoint.dcp import GatedStager, StormjibReader, StormjibWriter

if TYPE_CHECKING:
    import torch


def states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As torch's tutorial has them."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "train": {"step": 2, "seen": (1, 2)}}


def save(rank: int, world: int, root: str, path: str) -> None:
    """Save twice, the second time while training goes on; what was saved is dumped to `path`."""
    model, optimizer = build(1, (world,))
    writer, stager = StormjibWriter(), GatedStager()
    group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
    for _ in range(2):
        step(model, optimizer)
        answer = async_save(
            states(model, optimizer),
            checkpoint_id=root,
            storage_writer=writer,
            async_stager=stager,
            process_group=group,
        )
        dump(rank, model, optimizer, path)
        step(model, optimizer)  # waits for the copy
        assert isinstance(answer, AsyncSaveResponse)
        answer.upload_completion.result()
    stager.close()


def load(rank: int, world: int, root: str, path: str) -> None:
    """Load into a model that was never trained, on any number of ranks."""
    model, optimizer = build(9, (world,))
    state = states(model, optimizer)
    state["train"] = {"step": None, "seen": None}
    dcp_load(state, checkpoint_id=root, storage_reader=StormjibReader())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert state["train"] == {"step": 2, "seen": (1, 2)}
    dump(rank, model, optimizer, path)


def refused(rank: int, world: int, root: str) -> None:
    """A damaged step: every rank hears of it."""
    model, optimizer = build(9, (world,))
    with pytest.raises(CheckpointException, match="DamagedCheckpoint"):
        dcp_load(states(model, optimizer), checkpoint_id=root, storage_reader=StormjibReader())
