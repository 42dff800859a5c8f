"""The API server, as narrow as the operator needs it. The only file that imports the Kubernetes client.

The dynamic client is used without discovery: the kinds are known, and a list of every API group of a large cluster
would cost a second and a megabyte at each start.
"""

# The client is only partly annotated.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic import DynamicClient, Resource

from stormjib_operator import names
from stormjib_operator.errors import ApiError, Conflict, Refused, Unreachable

if TYPE_CHECKING:
    from stormjib_operator.observed import Manifest

REQUEST_S = 10.0
"""No request may take longer: a pass that hangs holds its job's place in the queue."""


class Cluster(Protocol):
    """What the operator asks of the API server. Every method raises ApiError."""

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """One object, or None where there is none."""

    async def pods(self, namespace: str, job: str) -> list[Manifest]:
        """All pods that carry the job's label."""

    async def create(self, manifest: Manifest) -> Manifest:
        """Make an object; Conflict where it exists. Unknown fields are refused, not dropped."""

    async def every(
        self, kind: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[Manifest]:
        """All objects of a kind that the selectors fit; no namespace is all of them."""

    async def apply(
        self, manifest: Manifest, *, status: bool = False, manager: str = names.FIELD_MANAGER
    ) -> Manifest:
        """Server-side apply; Conflict where the manifest names another resourceVersion than there is."""

    async def replace(self, manifest: Manifest) -> Manifest:
        """Put an object in place of the one with the same resourceVersion."""

    async def merge(self, kind: str, namespace: str, name: str, change: Manifest) -> None:
        """Merge-patch an object."""

    async def json_patch(
        self, kind: str, name: str, operations: list[Manifest], *, status: bool = False
    ) -> Manifest:
        """JSON-patch a cluster-scoped object; Conflict where a `test` in it does not hold."""

    async def delete_pod(self, namespace: str, name: str, uid: str) -> None:
        """Delete exactly that pod; nothing happens where it is gone or another one has its name."""

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """The same for any object; what depends on it goes in the background."""


_KINDS = {
    "TrainingJob": ("apis", names.GROUP, names.VERSION, names.PLURAL),
    "Pod": ("api", "", "v1", "pods"),
    "Service": ("api", "", "v1", "services"),
    "Secret": ("api", "", "v1", "secrets"),
    "Event": ("api", "", "v1", "events"),
    "ControllerRevision": ("apis", "apps", "v1", "controllerrevisions"),
    "NetworkPolicy": ("apis", "networking.k8s.io", "v1", "networkpolicies"),
    "Lease": ("apis", "coordination.k8s.io", "v1", "leases"),
    "Job": ("apis", "batch", "v1", "jobs"),
    "Node": ("api", "", "v1", "nodes"),
    names.NODE_ISOLATION: ("apis", names.GROUP, names.VERSION, "nodeisolations"),
    names.ISOLATION_POLICY: ("apis", names.GROUP, names.VERSION, "isolationpolicies"),
}
PAGE = 500


class _NoDiscovery:
    """Stands where the dynamic client would ask the server for all its kinds."""

    def __init__(self, client: DynamicClient, cache_file: str | None) -> None:
        self.client = client

    def __await__(self) -> Any:
        yield from ()
        return self


class ApiServer:
    """Cluster on a real API server."""

    def __init__(self, api: client.ApiClient, dynamic: DynamicClient) -> None:
        self._api = api
        self._dynamic = dynamic

    @staticmethod
    async def connect(kubeconfig: str | None = None) -> ApiServer:
        """Log in as the pod's ServiceAccount; outside a cluster by this kubeconfig, or the user's own."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(kubeconfig, client_configuration=configuration)
        api = client.ApiClient(configuration)
        return ApiServer(api, await DynamicClient(api, discoverer=_NoDiscovery))

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def get(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """See Cluster."""
        try:
            return await self._ask("get", _path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def pods(self, namespace: str, job: str) -> list[Manifest]:
        """See Cluster."""
        found = await self._ask("get", _path("Pod", namespace), label_selector=f"{names.JOB}={job}")
        items: list[Manifest] = found["items"]
        return items

    async def every(
        self, kind: str, namespace: str = "", *, labels: str = "", fields: str = ""
    ) -> list[Manifest]:
        """See Cluster."""
        items: list[Manifest] = []
        more = ""
        while True:
            query = [("limit", str(PAGE)), *([("continue", more)] if more else [])]
            query += [("labelSelector", labels)] if labels else []
            query += [("fieldSelector", fields)] if fields else []
            found = await self._ask("get", _path(kind, namespace), query=query)
            items += found["items"]
            more = found["metadata"].get("continue", "")
            if not more:
                return items

    async def create(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        path = _path(manifest["kind"], manifest["metadata"].get("namespace", ""))
        return await self._ask("post", path, body=manifest, query=[("fieldValidation", "Strict")])

    async def apply(
        self, manifest: Manifest, *, status: bool = False, manager: str = names.FIELD_MANAGER
    ) -> Manifest:
        """See Cluster."""
        meta = manifest["metadata"]
        path = _path(manifest["kind"], meta.get("namespace", ""), meta["name"])
        return await self._ask(
            "patch",
            path + ("/status" if status else ""),
            body=manifest,
            content_type="application/apply-patch+yaml",
            force_conflicts="true",
            manager=manager,
        )

    async def json_patch(
        self, kind: str, name: str, operations: list[Manifest], *, status: bool = False
    ) -> Manifest:
        """See Cluster."""
        path = _path(kind, "", name) + ("/status" if status else "")
        try:
            return await self._ask("patch", path, body=operations, content_type="application/json-patch+json")
        except ApiError as error:
            # For a test that does not hold the server has no word of its own; what is not valid it calls invalid.
            if error.code == 422 and "is invalid" not in error.message:
                raise Conflict(409, f"{kind} {name} is not as it was") from error
            raise

    async def replace(self, manifest: Manifest) -> Manifest:
        """See Cluster."""
        meta = manifest["metadata"]
        return await self._ask("put", _path(manifest["kind"], meta["namespace"], meta["name"]), body=manifest)

    async def merge(self, kind: str, namespace: str, name: str, change: Manifest) -> None:
        """See Cluster."""
        path = _path(kind, namespace, name)
        await self._ask("patch", path, body=change, content_type="application/merge-patch+json")

    async def delete_pod(self, namespace: str, name: str, uid: str) -> None:
        """See Cluster."""
        await self.delete("Pod", namespace, name, uid)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """See Cluster."""
        body = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        try:
            await self._ask("delete", _path(kind, namespace, name), body=body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def _ask(
        self,
        verb: str,
        path: str,
        *,
        query: list[tuple[str, str]] | None = None,
        manager: str = names.FIELD_MANAGER,
        **more: Any,
    ) -> Manifest:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S)
        parameters = [("fieldManager", manager)] if verb in ("post", "put", "patch") else []
        try:
            answer = await self._dynamic.request(
                verb,
                path,
                query_params=parameters + (query or []),
                header_params={"Accept": "application/json"},
                serialize=False,
                _request_timeout=timeout,
                **more,
            )
            found: Manifest = await answer.json()
        except ApiException as error:
            raise _translated(error) from error
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unreachable(0, f"{verb} {path}: {error!r}") from error
        return found


def _path(kind: str, namespace: str, name: str | None = None) -> str:
    prefix, group, version, plural = _KINDS[kind]
    resource = Resource(
        prefix=prefix,
        group=group,
        api_version=version,
        kind=kind,
        namespaced=bool(namespace),
        name=plural,
    )
    return str(resource.path(name=name, namespace=namespace or None))


def _translated(error: ApiException) -> ApiError:
    code = error.status or 0
    kinds: dict[int, type[ApiError]] = {404: ApiError, 409: Conflict, 429: Unreachable}
    kind = kinds.get(code, Refused if 400 <= code < 500 else Unreachable)
    return kind(code, _message(error))


def _message(error: ApiException) -> str:
    """The server's own words, from the Status object that it answers with."""
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
