"""Whether the generation is known to be over, or only not heard of. A coordinator that was cut off must begin nothing.

Training is synchronous: one member that is heard and does not step proves that nobody of its generation does. With no
member heard there are two explanations, that they are gone or that we are, and they look alike from here. Then only
somebody outside can tell: the operator, which replaces a coordinator that it cannot reach. To begin without either would
put a second generation above the one that trains on, on the other side of the cut, and fence its commits out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stormjib_runtime.state import Agent, State

LATER = 1.5
"""Heartbeats. When a cut takes everybody at once, members and operator were last heard at most one apart."""
STEADY = 0.9
"""A cut that heals delivers what was on its way, once. Only two words a heartbeat apart are a member's of today."""


def may_replace(state: State, now: float) -> bool:
    """Whether a generation may follow the present one: a member is heard, or the operator spoke when none was any more."""
    members = [(state.agents.get(member.slot), member.pod_uid) for member in state.members]
    known = [agent for agent, pod_uid in members if agent is not None and agent.report.pod_uid == pod_uid]
    if not members or any(_is_heard(agent, now) for agent in known):
        return True
    last = max((agent.heard for agent in known), default=state.started)
    return state.operator_heard >= last + LATER * state.heartbeat_s


def _is_heard(agent: Agent, now: float) -> bool:
    return not agent.silent(now) and agent.heard - agent.since >= STEADY * agent.heartbeat_s
