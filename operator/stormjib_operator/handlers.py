"""kopf as the shell: its watches say which job wants a look, and nothing more.

Only `on.event`, which leaves no annotation and no finalizer behind. What an event holds is not used: a pass reads what
is there now, so a repeated, late or lost event changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import kopf

from stormjib_operator import names
from stormjib_operator.queue import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stormjib_operator.queue import WorkQueue


def log_in(handlers: kopf.OperatorRegistry) -> None:
    """As the pod's ServiceAccount, or by kubeconfig outside a cluster."""

    @kopf.on.login(registry=handlers)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        # The other ways to log in would import a second, synchronous client.
        account = kopf.login_with_service_account(**arguments)
        if account is None:
            return kopf.login_with_kubeconfig(**arguments)
        # kopf goes by the server's name; its address works where the cluster has no DNS yet, or none that answers.
        return replace(account, server=_server())


def registry(queue: WorkQueue) -> kopf.OperatorRegistry:
    """Handlers that put jobs into the queue."""
    handlers = kopf.OperatorRegistry()
    log_in(handlers)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=handlers)
    async def job_changed(name: str | None, namespace: str | None, **_: Any) -> None:
        if name and namespace:
            queue.add(Key(namespace, name))

    async def child_changed(labels: Mapping[str, str], namespace: str | None, **_: Any) -> None:
        job = labels.get(names.JOB)
        if job and namespace:
            queue.add(Key(namespace, job))

    kopf.on.event("", "v1", "pods", registry=handlers)(child_changed)
    kopf.on.event("", "v1", "services", registry=handlers)(child_changed)
    return handlers


def _server() -> str:
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    return f"https://{f'[{host}]' if ':' in host else host}:{os.environ['KUBERNETES_SERVICE_PORT']}"


def settings() -> kopf.OperatorSettings:
    """kopf's settings: only our children are streamed, nothing else is asked of the API server."""
    kopfs = kopf.OperatorSettings()
    kopfs.scanning.disabled = True
    kopfs.posting.enabled = False
    kopfs.networking.request_timeout = 30
    kopfs.watching.server_timeout = 300
    kopfs.queueing.idle_timeout = 1.0  # how long kopf keeps a body after its event; we never look at it again
    kopfs.persistence.finalizer = f"{names.GROUP}/kopf"
    for children in ("pods", "services"):
        kopfs.watching.label_selectors["", "v1", children] = names.JOB
    return kopfs
