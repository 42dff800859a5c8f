"""torch's own hooks of a process group (2.14 and later): they see every call, also from C++ and from compiled code."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from stormjib_health.probe.calls import Calls
from stormjib_health.probe.details import KINDS
from stormjib_health.probe.groups import c10d, on_each
from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.probe.groups import Watch

HOOK = 0x53544A42
"""Ours among the hooks of a group: the same number would replace another's."""


def available() -> bool:
    """Whether this torch has them."""
    return hasattr(dist.ProcessGroup, "register_pre_hook")


def install(watch: Watch) -> None:
    """Watch the groups that there are, and all that are made from now on."""
    on_each(lambda name, group: attach(group, calls(watch, name)))


def calls(watch: Watch, name: str) -> Calls:
    """What is to be told of every call on the group of this name."""
    return Calls(watch, name, _kinds(), hear)


def attach(group: Any, told: Calls) -> None:
    """Tell `told` of every call on `group` from now on."""
    group.register_pre_hook(HOOK, told.before)


def hear(name: str, after: Callable[[Any], None] | None) -> None:
    """Have `after` called after each call on the group of this name; None: no more. Called from its pre-hook, it holds
    for the call that is just coming."""
    group = c10d._resolve_process_group(name)
    if after is None:
        group.unregister_post_hook(HOOK)
    else:
        group.register_post_hook(HOOK, after)


def detach(group: Any) -> None:
    """Tell nobody."""
    group.unregister_pre_hook(HOOK)
    group.unregister_post_hook(HOOK)


@cache
def _kinds() -> list[int]:
    """By the value of torch's HookOpName: a list takes one as its index in half the time that a dictionary hashes it."""
    names: Any = (
        _distributed_c10d.HookOpName.__members__
    )  # as indices, which their types do not say that they are
    kinds = [int(Kind.OTHER)] * (1 + max(int(value) for value in names.values()))
    for name, value in names.items():
        kinds[value] = int(KINDS.get(name, Kind.OTHER))
    return kinds
