"""Start the isolator: `python -m stormjib_operator.isolator`. The only part of ours that may write to nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kopf

from stormjib_operator import handlers, names
from stormjib_operator.cluster import ApiServer
from stormjib_operator.errors import ApiError, Conflict, SettingsError, StormjibOperatorError
from stormjib_operator.events import Recorder
from stormjib_operator.isolation import metrics, preflight
from stormjib_operator.isolation.actor import MANAGER, Actor
from stormjib_operator.isolation.models import Mode
from stormjib_operator.isolation.seen import see_node
from stormjib_operator.leader import Leader, Watches, served
from stormjib_operator.lease import ISOLATOR, Elector
from stormjib_operator.settings import Settings, from_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stormjib_operator.isolation.seen import Node

RESYNC_S = 300.0
SETTLE_S = 0.05
"""Events come in swarms: a short while after the first one, one pass sees them all."""
RETRY_S = 0.5

_log = logging.getLogger("stormjib_operator")


@dataclass(frozen=True)
class IsolatorSettings:
    """Everything that may differ between two installations."""

    base: Settings
    image: preflight.Image
    mode: Mode
    """Of the IsolationPolicy that is made where there is none."""


def settings_from(env: Mapping[str, str] = os.environ) -> IsolatorSettings:
    """The settings. Raises SettingsError naming what is missing or wrong."""
    base = from_environment(env)
    image = preflight.Image(
        image=base.render.image,
        pull_policy=base.render.pull_policy,
        pull_secrets=base.render.pull_secrets,
        run_as_user=base.render.run_as_user,
        args=tuple(_json(env, "STORMJIB_PREFLIGHT_ARGS", list)),
        env=tuple(_json(env, "STORMJIB_PREFLIGHT_ENV", list)),
        resources=_json(env, "STORMJIB_PREFLIGHT_RESOURCES", dict),
    )
    mode = env.get("STORMJIB_ISOLATION_MODE", Mode.REPORT_ONLY.value)
    if mode not in set(Mode):
        raise SettingsError(f"STORMJIB_ISOLATION_MODE is {mode!r}; wanted {' or '.join(Mode)}")
    return IsolatorSettings(base, image, Mode(mode))


def _json(env: Mapping[str, str], name: str, kind: type[Any]) -> Any:
    text = env.get(name, "")
    try:
        value = json.loads(text) if text else kind()
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}; wanted JSON") from error
    if not isinstance(value, kind):
        raise SettingsError(f"{name} is {text!r}; wanted a JSON {'list' if kind is list else 'object'}")
    return value


class Isolator:
    """Passes, one after the other, whenever something has changed that matters."""

    def __init__(self, settings: IsolatorSettings, cluster: ApiServer) -> None:
        base = settings.base
        self._settings = base
        self._elector = Elector(cluster, base.namespace, base.identity, ISOLATOR)
        self._news = asyncio.Event()
        recorder = Recorder(cluster, MANAGER)
        self._actor = Actor(cluster, recorder, base.namespace, settings.image, settings.mode)

    async def run(self) -> int:
        """The exit code: 0 where it was told to stop, 1 where it cannot go on."""
        watches = Watches(
            registry(self._news.set, self._matters), _kopf_settings(), (self._settings.namespace,)
        )

        async def begin() -> list[asyncio.Task[None]]:
            return [asyncio.create_task(self._passes(), name="passes")]

        async def close() -> None:
            return None

        return await Leader(self._elector, self._settings.identity, begin, close, watches).run()

    def _matters(self, node: Node) -> bool:
        return node.name in self._actor.concerned or node.marked

    async def _passes(self) -> None:
        while True:
            self._news.clear()
            again = await self._pass()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(RESYNC_S if again is None else again, RESYNC_S)):
                    await self._news.wait()
            await asyncio.sleep(SETTLE_S)

    async def _pass(self) -> float | None:
        try:
            again = await self._actor.look()
        except Conflict as error:
            _log.info("%s; reading everything again", error.message)
            metrics.PASSES.labels("conflict").inc()
            return SETTLE_S
        except ApiError as error:
            _log.warning("a pass broke off: %s", error)
            metrics.PASSES.labels("failed").inc()
            return RETRY_S
        metrics.PASSES.labels("done").inc()
        return again


def registry(wake: Callable[[], None], matters: Callable[[Node], bool]) -> kopf.OperatorRegistry:
    """Handlers that wake the isolator; what an event holds is not used but to tell whether it matters."""
    found = kopf.OperatorRegistry()
    handlers.log_in(found)

    async def changed(**_: Any) -> None:
        wake()

    async def node_changed(body: Mapping[str, Any], **_: Any) -> None:
        if matters(see_node(dict(body))):
            wake()

    kopf.on.event(names.GROUP, names.VERSION, "nodeisolations", registry=found)(changed)
    kopf.on.event(names.GROUP, names.VERSION, "isolationpolicies", registry=found)(changed)
    kopf.on.event("batch", "v1", "jobs", registry=found)(changed)
    kopf.on.event("", "v1", "nodes", registry=found)(node_changed)
    return found


def _kopf_settings() -> kopf.OperatorSettings:
    kopfs = handlers.settings()
    kopfs.watching.label_selectors["batch", "v1", "jobs"] = preflight.LABEL
    return kopfs


async def _main(settings: IsolatorSettings) -> int:
    cluster = await ApiServer.connect()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cluster.close)
        await stack.enter_async_context(served(settings.base.port))
        return await Isolator(settings, cluster).run()


def main() -> None:
    """Entry point of `stormjib-isolator` and `python -m stormjib_operator.isolator`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    try:
        code = asyncio.run(_main(settings_from()))
    except StormjibOperatorError as error:
        _log.error("%s", error)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
