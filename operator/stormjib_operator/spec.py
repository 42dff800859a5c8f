"""What the user wants, as typed models: the fields, bounds, defaults and rules of a TrainingJob's spec.

`crd.py` makes the schema of the CustomResourceDefinition from these models, so that what the API server checks and what
the operator reads cannot differ. The text under a field is what `kubectl explain` shows: full sentences, for a user.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from stormjib_health.verdict import Action, OnRecurrence, OnSpike, Scope, Syndrome
from stormjib_operator.fields import MAX_NODES, MAX_SPARES, Model, Name, Word, list_type, rule, rules
from stormjib_operator.template import Template


class LauncherKind(StrEnum):
    """Who starts the ranks."""

    STORMJIB = "Stormjib"
    TORCHRUN = "Torchrun"


class Launcher(Model):
    """What each node runs, and how many processes of it."""

    kind: LauncherKind = LauncherKind.STORMJIB
    """Who starts the ranks. Stormjib forks them from a process that has torch imported already, so that a restart
    takes a fraction of a second. Torchrun runs stock torchrun, and works with any script unchanged."""
    processes_per_node: Annotated[int, Field(ge=1, le=64)] = 1
    """How many ranks run on each node; usually one for each GPU."""
    command: Annotated[
        tuple[Word, ...], Field(min_length=1, max_length=64, json_schema_extra=list_type("atomic"))
    ]
    """What follows torchrun on a command line: a script, -m and a module, or --no-python and a program."""
    args: Annotated[tuple[Word, ...], Field(max_length=128, json_schema_extra=list_type("atomic"))] = ()
    """Arguments that are appended to the command."""


class Nodes(Model):
    """How many nodes the job wants, can do with, and keeps warm."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.minReplicas) || self.minReplicas <= self.replicas",
                "nodes.minReplicas must not be above nodes.replicas: lower minReplicas or raise replicas",
            ),
            rule(
                "!has(self.allowedReplicas) || self.replicas in self.allowedReplicas",
                "nodes.allowedReplicas must name nodes.replicas too: add it",
            ),
            rule(
                "!has(self.allowedReplicas) || self.allowedReplicas.all(n, n <= self.replicas && "
                "(!has(self.minReplicas) || n >= self.minReplicas))",
                "nodes.allowedReplicas must lie between nodes.minReplicas and nodes.replicas: take out the others",
            ),
        )
    )
    replicas: Annotated[int, Field(ge=1, le=MAX_NODES)]
    """How many nodes train together when all are well."""
    min_replicas: Annotated[int | None, Field(ge=1, le=MAX_NODES)] = None
    """The smallest number of nodes with which the job goes on when nodes are lost. Absent, it is the smallest of
    allowedReplicas; without those, the job never shrinks."""
    allowed_replicas: Annotated[
        tuple[Annotated[int, Field(ge=1, le=MAX_NODES)], ...] | None,
        Field(min_length=1, max_length=64, json_schema_extra=list_type("set")),
    ] = None
    """With which numbers of nodes the job may train, replicas among them, where not with any from minReplicas to
    replicas: those that its model can be laid out on. When nodes are lost, the largest that the rest can make up is
    taken, and other nodes wait as spares. It grows only to another of them."""
    spares: Annotated[int, Field(ge=0, le=MAX_SPARES)] = 0
    """How many further nodes are kept ready to take a lost node's place at once. They do not train."""

    @property
    def least(self) -> int:
        """The smallest allowed size."""
        if self.allowed_replicas is not None:
            return min(self.allowed_replicas)
        return self.replicas if self.min_replicas is None else self.min_replicas

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every allowed size."""
        return self.allowed_replicas or tuple(range(self.least, self.replicas + 1))

    @property
    def slots(self) -> int:
        return self.replicas + self.spares


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40
}  # fmt: skip


class TrainedModel(Model):
    """What is trained, as far as it says on how many nodes there is room for it: the state of a model is cut over the ranks
    (FSDP), in as many copies as are wanted and have room."""

    parameters: Annotated[int, Field(ge=1, le=2**53)]
    """How many parameters the model has. Each counts 20 bytes: weight, gradient, and of the optimizer a master weight and two moments."""
    layers: Annotated[int, Field(ge=1, le=65536)]
    """How many layers the model has. Where it is cut, two of them are whole in each rank at a time."""
    memory_per_rank: Annotated[
        str, Field(min_length=1, max_length=20, pattern=r"^[1-9][0-9]*([kMGT]|[KMGT]i)?$")
    ]
    """How much memory each rank has for weights, gradients and optimizer, without what activations take: 64Gi. A tenth of it is
    kept free."""
    replicate: Annotated[int, Field(ge=1, le=4096)] = 1
    """How many copies of each shard are wanted. On each number of nodes the most are taken that divide the ranks, are not above this
    and have room. Ranks find the number in STORMJIB_REPLICATE."""

    @property
    def memory_bytes(self) -> int:
        """`memory_per_rank` as a number."""
        digits = self.memory_per_rank.rstrip("kKMGTi")
        return int(digits) * _UNITS[self.memory_per_rank[len(digits) :]]


class Backoff(Model):
    """The pause before a restart when the one before it made no progress; it doubles each time."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.initialSeconds <= self.maxSeconds",
                "recovery.backoff.initialSeconds must not be above maxSeconds: lower it or raise maxSeconds",
            )
        )
    )
    initial_seconds: Annotated[int, Field(ge=1, le=3600)] = 1
    """The first pause, in seconds. The first restart after progress never waits."""
    max_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    """The longest pause, in seconds."""


class Shrink(Model):
    """When the job goes on with fewer nodes."""

    after_seconds: Annotated[int, Field(ge=0, le=86400)] = 5
    """How long a node whose container died may take to come back before the job goes on without it, in seconds.
    A node that is silent while the job stands still is not waited for."""


class RecoveryRule(Model):
    """What to do about a verdict of the health engine. Lists that are empty match anything."""

    syndromes: Annotated[
        tuple[Syndrome, ...], Field(max_length=16, json_schema_extra=list_type("atomic"))
    ] = ()
    """Which troubles the rule is about."""
    scopes: Annotated[tuple[Scope, ...], Field(max_length=4, json_schema_extra=list_type("atomic"))] = ()
    """Whether a rank, a link, a node or nobody is named."""
    confirmed: bool = False
    """Whether the rule is only for verdicts that a check, or the state of the process, has confirmed."""
    min_severity_percent: Annotated[int, Field(ge=0, le=100_000)] = 0
    """How long a step must take at least, in percent of what it took before. Only slowness has a severity above 100."""
    min_strikes: Annotated[int, Field(ge=0, le=1000)] = 0
    """How many verdicts must have named this node in this job, this one included."""
    action: Action
    """What to do. Note says it and goes on. Restart starts the ranks anew. Replace goes on without the pod that is
    named, and makes another on another node. Isolate does the same, and asks that the node be taken out for every job.
    Shrink goes on with fewer nodes and spends no spare. RollBack restarts from the checkpoint before the newest. Fail
    ends the job. A node is never held responsible for a fault of the program, whatever the rule says."""


class Recovery(Model):
    """What happens on a fault, and how often."""

    max_restarts: Annotated[int, Field(ge=0, le=10000)] = 100
    """How many faults of the job's own processes are recovered before the job is Failed. Lost nodes, planned leaves
    and changes of size are not counted."""
    backoff: Backoff = Backoff()
    """The pause between restarts that make no progress."""
    shrink: Shrink = Shrink()
    """When the job goes on with fewer nodes."""
    rules: Annotated[
        tuple[RecoveryRule, ...], Field(max_length=32, json_schema_extra=list_type("atomic"))
    ] = ()
    """What to do about verdicts of the health engine. The first rule that matches wins; behind them stand the defaults:
    restart on a hang, isolate on a second one of the same node and on corruption, replace a node that makes every step
    half as long again, and only say the rest."""


class HangAction(StrEnum):
    """What to do about a hang."""

    RESTART = "Restart"
    NOTIFY = "Notify"


class HangHealth(Model):
    """When a rank that takes no step any more is called hung, where there is no direct evidence."""

    factor_percent: Annotated[int, Field(ge=200, le=2000)] = 500
    """How many times the median step time, in percent, a rank may stand still."""
    floor_seconds: Annotated[int, Field(ge=1, le=86400)] = 60
    """How long a rank may stand still in any case, in seconds."""
    action: HangAction = HangAction.RESTART
    """Whether a hang restarts the ranks or is only reported."""


class Switch(StrEnum):
    """Whether something is done."""

    ON = "On"
    OFF = "Off"


class Integrity(Model):
    """What the trainer that comes with Stormjib does against silent corruption; another script may read the same
    wishes from its environment."""

    norms: Switch = Switch.ON
    """Whether each rank's gradient norm before mixing is compared with the others'. A step in which one stands out is
    done again before it is applied."""
    digests: Switch = Switch.ON
    """Whether ranks that hold the same shard compare the bits of weights and optimizer, a sixteenth in each step. Where
    they differ the job goes back to a checkpoint that is not in doubt. Without replicas there is nothing to compare."""
    on_spike: OnSpike = OnSpike.NOTIFY
    """What follows a jump of loss or gradient norm that came again when its step was done again: report it and go on
    (Notify), leave the batch out (Skip), fail, or go back to a checkpoint and see whether it comes again (Replay).
    Numbers that are not finite are never applied: with Notify they fail the step."""
    on_recurrence: OnRecurrence = OnRecurrence.FAIL
    """What follows a jump that came again after going back: leave the batch out (Skip) or fail."""


class Health(Model):
    """How faults are told from slowness."""

    hang: HangHealth = HangHealth()
    """When a rank that takes no step any more is called hung."""
    preflight: bool = True
    """Whether each node is checked before it first trains: memory, a product with known bits, transfers. A node that
    fails takes no part. On and Off without quotation marks are true and false in YAML."""
    integrity: Integrity = Integrity()
    """What is done against silent corruption."""


class PersistentVolumeClaim(Model):
    """A claim in the job's namespace that every node can write to (ReadWriteMany)."""

    claim_name: Name
    """The claim's name."""


class ObjectStore(Model):
    """A bucket or container of an object store."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.url.matches('^(s3|gs|az|fsspec[+]s3)://')",
                "checkpoint.storage.objectStore.url must begin with s3://, gs://, az:// or fsspec+s3://: "
                "a file system is a persistentVolumeClaim",
            ),
            rule(
                "!self.url.matches('^[^/]*//[^/]*[@:]|[?#]')",
                "checkpoint.storage.objectStore.url must hold a bucket and a prefix, no credentials, port or query: "
                "put credentials and endpoint into the Secret that secretName names",
            ),
            rule(
                "self.url.matches('^[^/]*://[^/]+(/[^/]+)*/?$') && !self.url.matches('/[.][.]?(/|$)')",
                "checkpoint.storage.objectStore.url must have a bucket, and no empty name, . or .. in its path: "
                "write it as s3://bucket/prefix",
            ),
        )
    )
    url: Annotated[str, Field(min_length=6, max_length=512)]
    """The URL of the bucket and, if wanted, a prefix in it, such as s3://bucket/team. Each job has a folder of its own below it, named
    by namespace and job."""
    secret_name: Name | None = None
    """A Secret of the job's namespace with credentials. Of its keys only these become environment variables of the container trainer:
    AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which must be there, AWS_SESSION_TOKEN, AWS_REGION, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL
    and AWS_ENDPOINT_URL_S3 for s3; GOOGLE_SERVICE_ACCOUNT_KEY for gs; AZURE_STORAGE_ACCOUNT_NAME, which must be there,
    AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_ENDPOINT, AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET for az.
    Absent, the identity of the pod is used."""

    @property
    def scheme(self) -> str:
        """What stands before the colon."""
        return self.url.partition(":")[0]


class Storage(Model):
    """Where checkpoints are kept: on a claim or in an object store."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.persistentVolumeClaim) != has(self.objectStore)",
                "checkpoint.storage must hold exactly one of persistentVolumeClaim and objectStore: "
                "name the one where checkpoints shall be kept",
            )
        )
    )
    persistent_volume_claim: PersistentVolumeClaim | None = None
    """The claim that holds the checkpoints, in a folder of its own for each namespace and job."""
    object_store: ObjectStore | None = None
    """The object store that holds the checkpoints, in a folder of its own for each namespace and job. The trainer's image needs its
    client: pip install 'stormjib[trainer,s3]'."""


class SigningKey(Model):
    """A key in a Secret of the job's namespace."""

    secret_name: Name
    """The Secret's name."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Which of its keys holds at least 16 random bytes."""


class Interval(Model):
    """How often a checkpoint is saved."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """A checkpoint is saved each time this many steps have been trained. Left out: one after the other, as long as training stands
    still for them less than 0.5 percent of its time; else as often as keeps to that, or as often as the failures seen make worth it."""


class Retention(Model):
    """Which checkpoints are kept."""

    keep_last: Annotated[int, Field(ge=1, le=100)] = 3
    """How many of the newest committed checkpoints are kept. Up to four more stay until the newest two have been read again and found whole:
    size the storage for that."""


class Checkpoint(Model):
    """Where, how often and how long checkpoints are saved."""

    storage: Storage
    """Where checkpoints are kept."""
    interval: Interval = Interval()
    """How often a checkpoint is saved."""
    retention: Retention = Retention()
    """Which checkpoints are kept."""
    signing_key: SigningKey | None = None
    """The key that the records of the checkpoints are signed with, so that forged ones are refused. A job begins with it or without it, and
    never changes it: records that are not signed with it are refused as well. Only the container trainer sees it."""
    peers: Annotated[int, Field(ge=0, le=1)] = 0
    """How many other nodes hold a copy of each step that lies in a node's memory and is not on the storage yet. With 1 such a step
    outlives its node; a node then needs as much memory again for its peer's ranks as for its own: two steps of each. Nothing is
    copied under Torchrun. A change takes effect when the job has been suspended and goes on."""


class Spec(Model):
    """What the user wants."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.model) || has(self.nodes.allowedReplicas) || !has(self.nodes.minReplicas) || "
                "self.nodes.replicas - self.nodes.minReplicas < 64",
                "with model at most 64 numbers of nodes are planned: name them in nodes.allowedReplicas, "
                "or raise nodes.minReplicas",
            ),
            rule(
                "self.suspend || self.launcher == oldSelf.launcher",
                "launcher cannot change while the job runs: set suspend: true first",
            ),
            rule(
                "self.suspend || self.template == oldSelf.template",
                "template cannot change while the job runs: set suspend: true first",
            ),
            rule(
                "self.suspend || (has(self.checkpoint) == has(oldSelf.checkpoint) && "
                "(!has(self.checkpoint) || self.checkpoint.storage == oldSelf.checkpoint.storage))",
                "checkpoint.storage cannot change while the job runs: set suspend: true first",
            ),
            rule(
                "self.suspend || !has(self.checkpoint) || !has(oldSelf.checkpoint) || "
                "(has(self.checkpoint.signingKey) == has(oldSelf.checkpoint.signingKey) && "
                "(!has(self.checkpoint.signingKey) || self.checkpoint.signingKey == oldSelf.checkpoint.signingKey))",
                "checkpoint.signingKey cannot change while the job runs: set suspend: true first",
            ),
        )
    )
    suspend: bool = False
    """Whether the job is held: it saves, stops, and gives its nodes back until this is false again."""
    template: Template
    """The pod that runs on each node, as in any workload. Our security defaults hold where it says nothing: not root,
    a read-only root file system, no capabilities, the seccomp profile RuntimeDefault, no service account token."""
    launcher: Launcher
    """What each node runs, and how many processes of it."""
    nodes: Nodes
    """How many nodes the job wants, can do with, and keeps warm."""
    model: TrainedModel | None = None
    """What is trained. Of the allowed numbers of nodes only those are then used on which it has room; the condition Feasible says of
    every other why not. Where it has room on none, the job does not start. A size that has no room any more is left at
    once; another number of copies counts from the next restart on."""
    recovery: Recovery = Recovery()
    """What happens on a fault, and how often."""
    health: Health = Health()
    """How faults are told from slowness."""
    checkpoint: Checkpoint | None = None
    """Where, how often and how long checkpoints are saved. Absent, every restart begins at the first step."""
