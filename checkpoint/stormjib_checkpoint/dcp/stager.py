"""DCP's stager behind our gate: what optimizers change is copied during the next forward and backward, everything else in the call.

DCP's own asynchronous stager leaves it to the script to wait before the optimizer steps. Here torch's optimizers wait by themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager

from stormjib_checkpoint.engine.gate import Gate, Staging
from stormjib_checkpoint.engine.saving import Figures
from stormjib_checkpoint.engine.torn import versions
from stormjib_checkpoint.engine.workers import Job, Workers
from stormjib_checkpoint.errors import TornCopy
from stormjib_checkpoint.tensors import local_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


State = dict[str, Any]


class GatedStager(AsyncStager):
    """`async_stager=GatedStager()` of `dcp.async_save`, which then returns an AsyncSaveResponse.

    Make one for all saves. An optimizer is known once it has stepped; until then its tensors are copied in the call.
    """

    def __init__(self) -> None:
        self._gate = Gate()
        self._copying = Workers("stormjib-stage")

    def stage(self, state_dict: State) -> Future[State]:
        """A copy of the state as it is now. The future raises TornCopy where a tensor changed that an optimizer holds."""
        guarded = self._gate.guarded()
        later: dict[str, torch.Tensor] = {}

        def now(name: str, tensor: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                address = local_of(tensor).untyped_storage().data_ptr()
            if address not in guarded:
                return _copied(tensor)
            later[name] = tensor
            return tensor

        taken = _mapped("", state_dict, now)
        before = versions(list(later.values()))
        on_cuda = any(tensor.is_cuda for tensor in later.values())
        ready = torch.cuda.current_stream().record_event().synchronize if on_cuda else None
        staged: Future[State] = Future()
        copying = Staging(Job(lambda: _settle(staged, lambda: _rest(taken, later, before, ready))))
        self._gate.shut(copying, Figures())
        self._copying.put(copying.job)
        return staged

    def synchronize_staging(self) -> None:
        """Call it before anything but an optimizer of torch changes what one of them holds."""
        self._gate.wait()

    def close(self) -> None:
        """Finish what is being copied, and let go of the optimizers."""
        self._copying.close()
        self._gate.close()


def _rest(
    taken: State,
    later: Mapping[str, torch.Tensor],
    before: Sequence[int],
    ready: Callable[[], None] | None,
) -> State:
    if ready is not None:
        ready()
    whole: State = _mapped("", taken, lambda name, t: _copied(t) if name in later else t)
    for name, old, new in zip(later, before, versions(list(later.values())), strict=True):
        if new != old:
            raise TornCopy(
                f"{name} changed while it was copied: this step is not saved. Call the stager's synchronize_staging() first"
            )
    return whole


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  whoever asks the future gets it
        future.set_exception(error)


def _mapped(name: str, value: Any, of_tensor: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """The same nesting with other tensors in it; what is no tensor is copied."""
    if isinstance(value, torch.Tensor):
        return of_tensor(name, value)
    if isinstance(value, Mapping):
        return {key: _mapped(f"{name}.{key}".lstrip("."), item, of_tensor) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(f"{name}.{i}", item, of_tensor) for i, item in enumerate(value))
    return copy.deepcopy(value)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the host, in memory of its own; of a DTensor this rank's part."""
    return tensor.detach().to("cpu", copy=True)
