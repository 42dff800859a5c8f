"""An API server in memory: objects by kind, namespace and name; it refuses what it is told to refuse.

It keeps the rules on which the operator builds: names are unique, uids are not reused, a status with a stale
resourceVersion is a conflict, and a delete with another uid does nothing.
"""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

from stormjib_operator.errors import ApiError, Conflict, Refused
from stormjib_operator.names import FIELD_MANAGER, JOB

if TYPE_CHECKING:
    from collections.abc import Callable

Manifest = dict[str, Any]
_Place = tuple[str, str, str]


class FakeCluster:
    """Cluster in memory."""

    def __init__(self) -> None:
        self.objects: dict[_Place, Manifest] = {}
        self.log: list[str] = []
        """What was asked, in order: `create Pod j-0-1`."""
        self.refuse: Callable[[Manifest], str | None] = lambda manifest: None
        self.before: Callable[[str, Manifest], None] = lambda verb, manifest: None
        """Called before each write; a test breaks a pass off by raising here."""
        self._numbers = itertools.count(1)

    def put(self, manifest: Manifest) -> Manifest:
        """An object that somebody else has written."""
        kept = copy.deepcopy(manifest)
        meta = kept["metadata"]
        meta.setdefault("uid", f"uid-{next(self._numbers)}")
        meta["resourceVersion"] = str(next(self._numbers))
        self.objects[_place(kept)] = kept
        return copy.deepcopy(kept)

    def names(self, kind: str) -> list[str]:
        """Names of all objects of a kind."""
        return sorted(name for found, _, name in self.objects if found == kind)

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """See Cluster."""
        return copy.deepcopy(self.objects.get((kind, namespace, name)))

    async def pods(self, namespace: str, job: str) -> list[Manifest]:
        """See Cluster."""
        found = (m for (kind, ns, _), m in self.objects.items() if (kind, ns) == ("Pod", namespace))
        return [copy.deepcopy(m) for m in found if m["metadata"].get("labels", {}).get(JOB) == job]

    async def every(
        self, kind: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[Manifest]:
        """See Cluster. Of field selectors it knows the one for a pod's node."""
        key, _, value = (labels or fields).partition("=")
        items = [m for (k, ns, _), m in self.objects.items() if k == kind and namespace in ("", ns)]
        if labels:
            items = [m for m in items if m["metadata"].get("labels", {}).get(key) == value]
        elif fields:
            items = [m for m in items if m["spec"].get("nodeName") == value]
        return copy.deepcopy(items)

    async def json_patch(
        self, kind: str, name: str, operations: list[Manifest], *, status: bool = False
    ) -> Manifest:
        """See Cluster. It knows `test`, `add`, `replace` and `remove` as the isolator says them."""
        fresh = copy.deepcopy(self.objects[kind, "", name])
        self._write("status" if status else "patch", fresh)
        for each in operations:
            patch(fresh, each)
        return self.put(fresh)

    async def create(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        self._write("create", manifest)
        if _place(manifest) in self.objects:
            raise Conflict(409, f"{_place(manifest)[2]} already exists")
        return self.put(manifest)

    async def apply(
        self, manifest: Manifest, *, status: bool = False, manager: str = FIELD_MANAGER
    ) -> Manifest:
        """See Cluster."""
        self._write("status" if status else "apply", manifest)
        old = self.objects.get(_place(manifest))
        wanted = manifest["metadata"].get("resourceVersion")
        if old is not None and wanted not in (None, old["metadata"]["resourceVersion"]):
            raise Conflict(409, "the object has been modified")
        if status:
            if old is None:
                raise ApiError(404, "not found")
            return self.put({**old, "status": manifest["status"]})
        fresh = copy.deepcopy(manifest)
        if manifest["kind"] == "Service":
            fresh["spec"].setdefault("clusterIP", "10.96.0.7")
        return self.put({**(old or {}), **fresh})

    async def replace(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        self._write("replace", manifest)
        old = self.objects.get(_place(manifest))
        if old is None or old["metadata"]["resourceVersion"] != manifest["metadata"]["resourceVersion"]:
            raise Conflict(409, "the object has been modified")
        return self.put(manifest)

    async def merge(self, kind: str, namespace: str, name: str, change: Manifest) -> None:
        """See Cluster."""
        old = self.objects.get((kind, namespace, name))
        if old is None:
            raise ApiError(404, "not found")
        self._write("merge", old)
        self.put({**old, **change})

    async def delete_pod(self, namespace: str, name: str, uid: str) -> None:
        """See Cluster."""
        await self.delete("Pod", namespace, name, uid)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """See Cluster."""
        place = (kind, namespace, name)
        found = self.objects.get(place)
        if found is not None and found["metadata"]["uid"] == uid:
            self._write("delete", found)
            del self.objects[place]

    def _write(self, verb: str, manifest: Manifest) -> None:
        self.before(verb, manifest)
        self.log.append(f"{verb} {manifest['kind']} {manifest['metadata']['name']}")
        words = self.refuse(manifest) if verb in ("create", "apply") else None
        if words:
            raise Refused(403, words)


def patch(target: Any, operation: Manifest) -> None:
    """One operation of a JSON patch. Raises Conflict where a test fails."""
    *path, last = operation["path"].removeprefix("/").split("/")
    for step in path:
        target = target[int(step) if isinstance(target, list) else step]
    verb, value = operation["op"], operation.get("value")
    if verb == "test":
        if target.get(last) != value:
            raise Conflict(409, f"test of {operation['path']} failed")
    elif verb == "remove":
        del target[last]
    else:
        target[last] = value


def _place(manifest: Manifest) -> _Place:
    meta = manifest["metadata"]
    return manifest["kind"], meta.get("namespace", ""), meta["name"]
