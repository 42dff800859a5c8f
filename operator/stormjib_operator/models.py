"""What the operator writes, and the TrainingJob as a whole; see `spec.py` for what the user writes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stormjib_operator.fields import MAX_SLOTS, Count, GenerationText, Model, Step, Text, Time, list_type
from stormjib_operator.spec import Spec


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(Model):
    """One fact about the job, as everywhere in Kubernetes."""

    type: Annotated[str, Field(max_length=64)]
    """What the fact is about."""
    status: ConditionStatus
    """Whether it holds."""
    reason: Annotated[
        str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")
    ]
    """One word that says why."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """Sentences for a person: what is, where, and what to do."""
    last_transition_time: Time
    """When the status last changed."""
    observed_generation: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The generation of the spec that the condition speaks of."""


class NodesStatus(Model):
    """How many nodes are wanted, train, and stand by."""

    desired: Count = 0
    """How many nodes shall train together."""
    active: Count = 0
    """How many nodes train together now."""
    ready: Count = 0
    """How many nodes are registered and ready, spares included."""
    spares: Count = 0
    """How many ready nodes do not train."""
    summary: Annotated[str, Field(max_length=32)] = ""
    """Active and desired nodes in one word, such as 2/2+1 with one spare."""


class Restarts(Model):
    """How often the ranks were started anew."""

    total: Count = 0
    """Restarts after a fault of any kind."""
    counted: Count = 0
    """Restarts that recovery.maxRestarts pays for."""


class Progress(Model):
    """How far the training is."""

    step: Step = -1
    """The last step that a rank reported as done, or -1 before the first one."""
    loss: Annotated[str, Field(max_length=32)] = ""
    """The loss at that step, where the script reports one."""
    last_updated_time: Time | None = None
    """When these figures were written; they are refreshed every ten seconds at most."""


class CheckpointStatus(Model):
    """What is safe."""

    last_committed_step: Step = -1
    """The newest step whose checkpoint is complete, or -1."""
    last_committed_time: Time | None = None
    """When the operator first saw that step."""


class EvidenceStatus(Model):
    """One row of what a verdict rests on."""

    name: Annotated[str, Field(max_length=64)]
    """What was measured or counted."""
    who: Annotated[str, Field(max_length=64)]
    """Whose value it is."""
    value: Annotated[str, Field(max_length=64)]
    """What it is."""
    others: Annotated[str, Field(max_length=64)] = ""
    """The same of the others, or of before."""


class VerdictStatus(Model):
    """What the health engine found."""

    id: Annotated[int, Field(ge=0, le=2**53)]
    """The number of the trouble within its generation."""
    generation: GenerationText
    """The generation in which it was found."""
    syndrome: Annotated[str, Field(max_length=32)]
    """What kind of trouble it is."""
    scope: Annotated[str, Field(max_length=16)]
    """What the culprits are: ranks, the two ranks of a link, the slots of nodes, or nobody."""
    culprits: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...],
        Field(max_length=16, json_schema_extra=list_type("atomic")),
    ] = ()
    """Who it is."""
    confidence_percent: Annotated[int, Field(ge=0, le=100)] = 0
    """How sure the engine is."""
    confirmed: bool = False
    """Whether a check, or the state of the process, says the same."""
    software: bool = False
    """Whether the program is at fault, and no node."""
    detection_milliseconds: Annotated[int, Field(ge=0, le=2**53)] = 0
    """From the first sign to the verdict."""
    evidence: Annotated[
        tuple[EvidenceStatus, ...], Field(max_length=8, json_schema_extra=list_type("atomic"))
    ] = ()
    """What the verdict rests on."""
    stack: Annotated[str, Field(max_length=2048)] = ""
    """Where the culprit's threads were."""


class FaultStatus(Model):
    """One fault, kept as evidence."""

    generation: GenerationText
    """The generation that the fault led to."""
    time: Time
    """When the operator learned of it."""
    cause: Annotated[str, Field(max_length=64)]
    """What happened, in one word."""
    slot: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    """The slot in which it happened."""
    rank: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    """The rank to which it happened."""
    node_name: Annotated[str, Field(max_length=253)] = ""
    """The node in which it happened."""
    message: Text = ""
    """What was seen, such as a rank's last lines."""
    verdict: VerdictStatus | None = None
    """What the health engine found, where that is why."""


class AvoidedNode(Model):
    """A node that the job keeps away from."""

    node_name: Annotated[str, Field(max_length=253)]
    """The name of the node."""
    evidence: Annotated[str, Field(max_length=128)] = ""
    """The accusation behind it, as in the NodeIsolation; once that is answered, the node is used again. Empty where only
    the job's own rules want its pods elsewhere."""


class Accusations(Model):
    """What became of the accusations that the job's coordinator has made against nodes."""

    incarnation: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The incarnation of the coordinator whose accusations are counted."""
    newest: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The number of its newest accusation that was looked at."""
    considered: Count = 0
    """How many of its accusations were looked at."""
    refused: Count = 0
    """How many accusations were refused, since the job began."""
    nodes: Annotated[
        tuple[AvoidedNode, ...], Field(max_length=16, json_schema_extra=list_type("map", "nodeName"))
    ] = ()
    """Nodes that the job keeps away from."""


class SlotStatus(Model):
    """Which pod stands for a slot."""

    slot: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """The slot's number."""
    attempt: Annotated[int, Field(ge=0, le=2**31 - 1)]
    """The attempt that names the slot's pod."""
    pod_uid: Annotated[str, Field(max_length=64, alias="podUID")] = ""
    """The uid of that pod once it was seen; a slot whose pod is gone gets the next attempt."""


class CoordinatorStatus(Model):
    """Which pod decides for the job."""

    incarnation: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The incarnation that names the coordinator's pod."""
    pod_uid: Annotated[str, Field(max_length=64, alias="podUID")] = ""
    """The uid of that pod once it was seen."""
    node_name: Annotated[str, Field(max_length=253)] = ""
    """The node on which it runs."""
    avoid_node_name: Annotated[str, Field(max_length=253)] = ""
    """The node of the coordinator before it, which this one must keep away from."""
    cluster_ip: Annotated[str, Field(max_length=45, alias="clusterIP")] = ""
    """The address of the coordinator's Service, under which the pods find it."""


class Status(Model):
    """What is. Written by the operator alone."""

    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra=list_type("map", "type"))
    ] = ()
    """The facts about the job. Running's reason is its state in one word."""
    observed_generation: Annotated[int, Field(ge=0, le=2**53)] = 0
    """The generation of the spec that this status speaks of."""
    generation: GenerationText | None = None
    """The newest generation of the training, as incarnation and number. It grows with every restart and change of size."""
    incarnation: Annotated[int, Field(ge=0, le=2**53)] = 0
    """How often the job had to be given a new coordinator, or was raised above a predecessor's checkpoints."""
    attempts: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """How many attempts have been given to slots; it names the next pod."""
    nodes: NodesStatus = NodesStatus()
    """How many nodes are wanted, train, and stand by."""
    restarts: Restarts = Restarts()
    """How often the ranks were started anew."""
    progress: Progress = Progress()
    """How far the training is."""
    checkpoint: CheckpointStatus = CheckpointStatus()
    """What is safe."""
    faults: Annotated[
        tuple[FaultStatus, ...], Field(max_length=10, json_schema_extra=list_type("atomic"))
    ] = ()
    """The last faults, newest first."""
    start_time: Time | None = None
    """When the job's pods were first asked for."""
    completion_time: Time | None = None
    """When the job became Complete or Failed."""
    template: Annotated[str, Field(max_length=253)] = ""
    """The ControllerRevision that keeps the pods as they were rendered when the job started."""
    coordinator: CoordinatorStatus = CoordinatorStatus()
    """Which pod decides for the job."""
    slots: Annotated[
        tuple[SlotStatus, ...], Field(max_length=MAX_SLOTS, json_schema_extra=list_type("map", "slot"))
    ] = ()
    """Which pod stands for each slot."""

    isolation: Accusations = Accusations()
    """What became of the accusations that the job's coordinator has made against nodes."""

    def condition(self, kind: str) -> Condition | None:
        """The condition of a type, or None."""
        return next((c for c in self.conditions if c.type == kind), None)

    def holds(self, kind: str) -> bool:
        """Whether the condition of a type is True."""
        found = self.condition(kind)
        return found is not None and found.status is ConditionStatus.TRUE


class TrainingJob(Model):
    """A TrainingJob is one training that goes on through faults of processes, nodes and the operator itself."""

    spec: Spec
    """What the user wants."""
    status: Status = Status()
    """What is. Written by the operator alone."""
