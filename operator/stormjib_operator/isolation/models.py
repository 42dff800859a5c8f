"""NodeIsolation and IsolationPolicy as typed models; `crd.py` makes both definitions from them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from stormjib_operator.fields import Model, Name, Text, Time, list_type, rule, rules
from stormjib_operator.models import Condition

MAX_EVIDENCE = 64
MAX_HISTORY = 20
MAX_RECENT = 128

Percent = Annotated[int, Field(ge=0, le=1000)]
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Namespace = Annotated[str, Field(min_length=1, max_length=63)]


# --- NodeIsolation: written by the operator (spec) and the isolator (status) ----------------------------------------


class Evidence(Model):
    """What the jobs of one namespace say against the node: the heaviest and newest verdict among them."""

    namespace: Namespace
    """The namespace of the job. All jobs of one namespace speak with one voice."""
    id: Annotated[str, Field(min_length=1, max_length=128)]
    """The job's uid, its coordinator's incarnation and the number of the accusation."""
    job: Annotated[str, Field(min_length=1, max_length=63)]
    """The name of the job."""
    slot: Number
    """The slot of the job that was on the node."""
    pod_uid: Annotated[str, Field(max_length=64, alias="podUID")]
    """The uid of that slot's pod."""
    generation: Annotated[str, Field(max_length=41)]
    """The generation of the training in which it was found."""
    syndrome: Annotated[str, Field(max_length=64)]
    """What was found, in one word."""
    confirmed: bool = False
    """Whether a check, or the kernel's own word, said the same."""
    weight_percent: Annotated[int, Field(ge=0, le=90)]
    """What the verdict weighs when it is new, in percent of what isolates. A job's own word never weighs 100."""
    sentence: Text = ""
    """The verdict in a sentence."""
    time: Time
    """When the operator took the accusation."""
    job_nodes: Number = 0
    """How many slots the job has."""
    least_nodes: Number = 0
    """How many nodes all jobs that train need at least, by the operator's own records at that time."""
    left: bool = False
    """Whether no pod of the namespace is on the node any more. Only then does a preflight of ours count."""
    departures: Number = 0
    """How often the last pod of the namespace has left the node since then."""


class IsolationSpec(Model):
    """What speaks against a node."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.nodeName == oldSelf.nodeName",
                "nodeName cannot change: make another NodeIsolation for another node",
            )
        )
    )
    node_name: Name
    """The name of the node."""
    reason: Text = ""
    """Why, in a sentence."""
    evidence: Annotated[
        tuple[Evidence, ...],
        Field(max_length=MAX_EVIDENCE, json_schema_extra=list_type("map", "namespace")),
    ] = ()
    """What jobs say against the node, one entry for each namespace."""


class State(StrEnum):
    """Where a node stands between the first suspicion and its release."""

    PROPOSED = "Proposed"  # something speaks against it
    BLOCKED = "Blocked"  # it would be isolated; a limit, the mode or a human forbids it
    ISOLATED = "Isolated"  # decided, and being marked
    COOLDOWN = "Cooldown"  # marked, resting
    VERIFYING = "Verifying"  # marked, a preflight runs
    PROBATION = "Probation"  # given back, watched
    RELEASED = "Released"  # nothing speaks against it
    NEEDS_REPAIR = "NeedsRepair"  # marked until a human deletes the NodeIsolation

    @property
    def marked(self) -> bool:
        """Whether the node bears our mark, or is about to."""
        return self in MARKED


MARKED = (State.ISOLATED, State.COOLDOWN, State.VERIFYING, State.NEEDS_REPAIR)


class Weight(Model):
    """What one source weighs now."""

    source: Annotated[str, Field(max_length=320)]
    """Who says it: a namespace, Preflight, or a condition of the node."""
    percent: Percent
    """Its weight in percent; 100 of all sources together isolate."""


class Turn(Model):
    """One change of state."""

    time: Time
    """When it came."""
    state: State
    """The state from then on."""
    message: Text = ""
    """Why it came so."""


class Outcome(StrEnum):
    """How a preflight stands, or ended."""

    RUNNING = "Running"
    PASSED = "Passed"
    FAILED = "Failed"
    UNKNOWN = "Unknown"  # it could not be run, or was disturbed: that says nothing about the node


class PreflightStatus(Model):
    """The preflight that runs now."""

    job_name: Annotated[str, Field(max_length=63)] = ""
    """The name of the Job."""
    departures: Number = 0
    """The sum of all departures when it began: a namespace that came back in between spoils it."""


class IsolationStatus(Model):
    """Where the node stands. Written by the isolator alone."""

    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=8, json_schema_extra=list_type("map", "type"))
    ] = ()
    """Marked says whether the node bears our taint; Blocked says what forbids it."""
    state: State = State.PROPOSED
    """Where the node stands."""
    reason: Text = ""
    """Why it stands there."""
    since: Time | None = None
    """When it came there."""
    isolated_time: Time | None = None
    """When it was last isolated."""
    weight_percent: Percent = 0
    """What speaks against the node, all sources together."""
    weights: Annotated[
        tuple[Weight, ...],
        Field(max_length=MAX_EVIDENCE + 17, json_schema_extra=list_type("map", "source")),
    ] = ()
    """What each source weighs."""
    strikes: Number = 0
    """How often the node has been isolated."""
    passes: Number = 0
    """Preflights passed in a row."""
    fails: Number = 0
    """Preflights failed since the last change between suspicion, isolation and release."""
    runs: Number = 0
    """Preflights begun; it names the next one."""
    last_outcome: Outcome | None = None
    """How the last preflight ended."""
    last_outcome_time: Time | None = None
    """When the last preflight ended."""
    last_fail_time: Time | None = None
    """When a preflight last failed."""
    preflight: PreflightStatus | None = None
    """The preflight that runs now."""
    answered: Annotated[
        tuple[Annotated[str, Field(max_length=128)], ...],
        Field(max_length=MAX_EVIDENCE, json_schema_extra=list_type("set")),
    ] = ()
    """Evidence that a passed preflight or a release has answered; it weighs nothing any more."""
    history: Annotated[
        tuple[Turn, ...], Field(max_length=MAX_HISTORY, json_schema_extra=list_type("atomic"))
    ] = ()
    """The last changes of state, newest first."""


class NodeIsolation(Model):
    """A NodeIsolation is what is held against one node, and where that node stands. Deleting it releases the node."""

    spec: IsolationSpec
    """What speaks against a node."""
    status: IsolationStatus = IsolationStatus()
    """Where the node stands. Written by the isolator alone."""


# --- IsolationPolicy: written by an administrator -------------------------------------------------------------------


class Mode(StrEnum):
    """What the isolator may do."""

    REPORT_ONLY = "ReportOnly"
    TAINT = "Taint"


class Limits(Model):
    """What isolation must never exceed. Each of them can only forbid."""

    max_isolated_percent: Annotated[int, Field(ge=0, le=20)] = 5
    """How many of the nodes that opted in may be isolated at a time, in percent; one node always may."""
    max_per_window: Annotated[int, Field(ge=1, le=64)] = 3
    """How many nodes may be isolated within one window."""
    window_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """The length of the window, in seconds."""
    topology_key: Annotated[str, Field(max_length=317)] = "topology.kubernetes.io/rack"
    """The label of nodes that names their failure domain. A node without it is in no domain."""
    max_per_domain: Annotated[int, Field(ge=1, le=64)] = 1
    """How many nodes of one failure domain may be isolated at a time: two in one rack are the rack's fault."""
    max_nodes_per_job: Annotated[int, Field(ge=0, le=64)] = 2
    """How many nodes may be isolated at a time on the evidence of one job."""
    correlation_percent: Annotated[int, Field(ge=1, le=100)] = 20
    """A job that accuses two or more of its nodes at a time, and more of them than this, in percent, has a fault of
    its program or of the network: none of them is isolated."""
    breaker_percent: Annotated[int, Field(ge=1, le=50)] = 20
    """When more nodes than this, in percent of those that opted in, and more than may be isolated, are to be isolated
    at a time, the breaker opens: no node is isolated until a human closes it."""
    storm_cooldown_seconds: Annotated[int, Field(ge=0, le=86400)] = 600
    """For how long after the breaker was closed no node is isolated, in seconds."""
    free_capacity: bool = True
    """Whether so many healthy nodes must stay as all training jobs need at least."""


class OptIn(Model):
    """The label of nodes that may be isolated."""

    key: Annotated[str, Field(min_length=1, max_length=317)] = "stormjib.io/isolation"
    """The label's key."""
    value: Annotated[str, Field(max_length=63)] = "enabled"
    """The label's value."""


class NodeCondition(Model):
    """A condition of a node, written by another party, that speaks against the node."""

    type: Annotated[str, Field(min_length=1, max_length=128)]
    """The condition's type."""
    status: Annotated[str, Field(min_length=1, max_length=16)] = "True"
    """The status that speaks against the node."""


class PolicySpec(Model):
    """What may be isolated, and how fast."""

    mode: Mode = Mode.REPORT_ONLY
    """ReportOnly does everything but write to nodes. Taint also taints the node and gives it a condition."""
    pause_requests: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=253)], ...],
        Field(max_length=16, json_schema_extra=list_type("set")),
    ] = ()
    """Reasons for which no further node is isolated, such as an upgrade. Empty, nothing is paused."""
    opt_in_label: OptIn = OptIn()
    """The label of nodes that may be isolated. The label stormjib.io/isolation: disabled always keeps a node out."""
    pool_taint_keys: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=317)], ...],
        Field(max_length=16, json_schema_extra=list_type("set")),
    ] = ("nvidia.com/gpu",)
    """Keys of taints that nodes bear all the time. A node with any other foreign taint is left to whoever set it."""
    node_conditions: Annotated[
        tuple[NodeCondition, ...], Field(max_length=16, json_schema_extra=list_type("map", "type"))
    ] = (
        NodeCondition(type="AcceleratedHardwareReady", status="False"),
        NodeCondition(type="KernelDeadlock"),
    )
    """Conditions of nodes that speak against a node which a job accuses."""
    trusted_namespaces: Annotated[
        tuple[Namespace, ...], Field(max_length=64, json_schema_extra=list_type("set"))
    ] = ()
    """Namespaces whose verdicts isolate alone once a check has confirmed them. Whoever can run a pod there can isolate
    nodes, within the limits."""
    half_life_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 86400
    """After so many seconds evidence weighs half."""
    cooldown_seconds: Annotated[int, Field(ge=1, le=7 * 86400)] = 600
    """How long an isolated node rests before a preflight, and before the next one where it failed, in seconds."""
    probation_seconds: Annotated[int, Field(ge=1, le=30 * 86400)] = 86400
    """How long a node that was given back is watched, in seconds."""
    limits: Limits = Limits()
    """What isolation must never exceed."""


class Recent(Model):
    """One isolation, remembered whatever becomes of its NodeIsolation."""

    node_name: Name
    """The name of the node."""
    time: Time
    """When it was isolated."""


class Breaker(Model):
    """Whether a human has to look first."""

    open: bool = False
    """Whether no node is isolated until a human says so."""
    trip: Number = 0
    """The number of the newest trip. Annotate the policy with stormjib.io/reset-breaker: "NUMBER" to close it."""
    message: Text = ""
    """What opened it."""
    time: Time | None = None
    """When it was last opened or closed."""


class PolicyStatus(Model):
    """What the isolator has to remember. Written by the isolator alone."""

    recent: Annotated[
        tuple[Recent, ...], Field(max_length=MAX_RECENT, json_schema_extra=list_type("atomic"))
    ] = ()
    """The last isolations, newest first."""
    breaker: Breaker = Breaker()
    """Whether a human has to look first."""


class IsolationPolicy(Model):
    """An IsolationPolicy says which nodes may be isolated, and how fast. There is one, and its name is default."""

    spec: PolicySpec = PolicySpec()
    """What may be isolated, and how fast."""
    status: PolicyStatus = PolicyStatus()
    """What the isolator has to remember. Written by the isolator alone."""
