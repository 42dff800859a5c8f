"""Which process groups there are: torch makes every one known at one place, whoever makes it and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from stormjib_health.probe.ends import Ends

if TYPE_CHECKING:
    from collections.abc import Callable

    from stormjib_health.records.groups import GroupsWriter
    from stormjib_health.records.ring import Lane, Recorder

c10d: Any = distributed_c10d  # what is used of it is private, and untyped


class Watch:
    """What the watchers of all groups of this rank share."""

    def __init__(self, recorder: Recorder, groups: GroupsWriter) -> None:
        self.recorder = recorder
        self.ends = Ends(recorder)
        self._groups = groups

    def lane(self, name: str) -> tuple[Lane | None, tuple[int, ...]]:
        """Lane and global ranks of the group that torch knows by this name; no lane where there is room for no more.

        Looked up at a group's first call, because torch learns of its ranks after it has made it known, and by its name,
        because who keeps a group keeps its threads.
        """
        group = c10d._resolve_process_group(name)
        ranks = tuple(dist.get_process_group_ranks(group))
        index = self._groups.add(f"{group.group_desc}:{name}", ranks)
        return None if index is None else self.recorder.lane(index), ranks


def on_each(made: Callable[[str, Any], None]) -> None:
    """Call `made(name, group)` for every group that there is, and for each that is made from now on."""
    register = c10d._register_process_group

    def registering(name: str, group: Any) -> None:
        register(name, group)
        made(name, group)

    c10d._register_process_group = registering
    for group, name in c10d._world.pg_names.items():
        made(name, group)
