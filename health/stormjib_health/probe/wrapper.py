"""For a torch whose groups have no hooks (before 2.14): the functions of torch.distributed, wrapped.

Seen are calls that go through these functions: plain scripts, FSDP2, object collectives. Not seen are calls from C++ (DDP), functional
collectives and compiled code; Flight Recorder is the only witness of those there.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from stormjib_health.probe.calls import Calls
from stormjib_health.probe.details import KINDS
from stormjib_health.probe.groups import c10d, on_each

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.probe.groups import Watch


@dataclass(frozen=True)
class _Form:
    """One function: torch's name of the operation, and which of its parameters hold what."""

    name: str
    inputs: str = ""
    outputs: str = ""
    peer: str = ""


FUNCTIONS = {
    "all_reduce": _Form("ALLREDUCE", "tensor"),
    "all_gather": _Form("ALLGATHER", "tensor", "tensor_list"),
    "all_gather_into_tensor": _Form("ALLGATHER_BASE", "input_tensor", "output_tensor"),
    "all_gather_single": _Form("ALLGATHER_BASE", "input_tensor", "output_tensor"),
    "reduce_scatter": _Form("REDUCE_SCATTER", "input_list", "output"),
    "reduce_scatter_tensor": _Form("REDUCE_SCATTER_BASE", "input", "output"),
    "reduce_scatter_single": _Form("REDUCE_SCATTER_BASE", "input", "output"),
    "broadcast": _Form("BROADCAST", "tensor"),
    "reduce": _Form("REDUCE", "tensor"),
    "gather": _Form("GATHER", "tensor", "gather_list"),
    "scatter": _Form("SCATTER", "scatter_list", "tensor"),
    "all_to_all": _Form("ALLTOALL", "input_tensor_list", "output_tensor_list"),
    "all_to_all_single": _Form("ALLTOALL_BASE", "input", "output"),
    "barrier": _Form("BARRIER"),
    "send": _Form("SEND", "tensor", peer="dst"),
    "isend": _Form("SEND", "tensor", peer="dst"),
    "recv": _Form("RECV", "", "tensor", peer="src"),
    "irecv": _Form("RECV", "", "tensor", peer="src"),
}


class _Called:
    """One call, in the shape of torch's hook arguments. Looks at the parameters only when asked."""

    def __init__(self, form: _Form, bound: inspect.BoundArguments, group: Any) -> None:
        self.name = form.name
        self.op_id = id(self)
        self.work: Any = None
        self._form, self._values, self._group = form, bound.arguments, group

    @property
    def input_tensors(self) -> list[Any]:
        return self._tensors(self._form.inputs)

    @property
    def output_tensors(self) -> list[Any]:
        return self._tensors(self._form.outputs)

    @property
    def root(self) -> int:
        """The other side's rank in the group."""
        inside = self._values.get(f"group_{self._form.peer}")
        if inside is not None:
            return int(inside)
        outside = self._values.get(self._form.peer)
        return -1 if outside is None else dist.get_group_rank(self._group, outside)

    def _tensors(self, name: str) -> list[Any]:
        value = self._values.get(name)
        return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


class _Wrapper:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._calls: dict[str, Calls] = {}
        self._depth = threading.local()

    def made(self, name: str, _: Any) -> None:
        """A group of this name is new, whatever had it before."""
        self._calls[name] = Calls(self._watch, name, KINDS, _hears_all)

    def wrap(self, function: Callable[..., Any], form: _Form) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._depth, "inside", False):  # one of ours has called another: `send` is an `isend`
                return function(*args, **kwargs)
            called, calls = self._called(form, signature, args, kwargs)
            if calls is None:
                return function(*args, **kwargs)
            self._depth.inside = True
            try:
                calls.before(called)
                called.work = function(*args, **kwargs)
                calls.after(called)
            finally:
                self._depth.inside = False
            return called.work

        return recorded

    def _called(
        self, form: _Form, signature: inspect.Signature, args: Any, kwargs: Any
    ) -> tuple[Any, Calls | None]:
        """No watcher where torch itself will refuse the call, or this rank is not in the group."""
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return None, None
        group = bound.arguments.get("group") or dist.group.WORLD
        name = getattr(group, "group_name", None)
        return _Called(form, bound, group), self._calls.get(name) if name is not None else None


def _hears_all(name: str, after: Callable[[Any], None] | None) -> None:
    """A wrapper is there after every call anyway."""


def install(watch: Watch) -> None:
    """Wrap the functions where torch keeps them and where scripts take them from."""
    wrapper = _Wrapper(watch)
    on_each(wrapper.made)
    for name, form in FUNCTIONS.items():
        function = getattr(c10d, name, None)
        if function is not None:  # names differ between releases
            wrapped = wrapper.wrap(function, form)
            setattr(c10d, name, wrapped)
            setattr(dist, name, wrapped)
