"""Every name that the operator gives or reads: group, labels, children, conditions, reasons.

One function or constant makes each of them, so that no name is built in two places. Beside each stands who reads it.
"""

from __future__ import annotations

from enum import StrEnum

GROUP = "stormjib.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TrainingJob"
PLURAL = "trainingjobs"
FIELD_MANAGER = "stormjib-operator"
NODE_ISOLATION = "NodeIsolation"
ISOLATION_POLICY = "IsolationPolicy"
POLICY = "default"
"""The name of the one IsolationPolicy."""

# --- labels of children; selectors, the watch of the operator and people read them --------------------------------
JOB = f"{GROUP}/job"
ROLE = f"{GROUP}/role"
SLOT = f"{GROUP}/slot"
ATTEMPT = f"{GROUP}/attempt"
INCARNATION = f"{GROUP}/incarnation"
# --- annotations; only the operator reads them ----------------------------------------------------------------------
APPLIED = f"{GROUP}/applied"
"""Digest of the manifest as it was applied: tells whether a Service or NetworkPolicy is the one we want."""

AVOIDS = f"{GROUP}/avoids"
"""On a slot's pod: the nodes that it was kept off when it was made, with commas between them."""
# --- on nodes; the isolator writes the first two, an administrator the label ---------------------------------------
TAINT = f"{GROUP}/isolated"
SUSPECT = "TrainingHardwareSuspect"
"""The condition of an isolated node."""
ISOLATION_LABEL = f"{GROUP}/isolation"
"""`enabled` opts a node in, unless the policy names another label; `disabled` always keeps it out."""
# --- on the IsolationPolicy; an administrator writes it -------------------------------------------------------------
RESET_BREAKER = f"{GROUP}/reset-breaker"
"""The number of the trip that is to be closed."""

TRAINER = "trainer"
"""The container of the template that is ours."""
COORDINATOR_PORT = 7070
HOSTNAME = "kubernetes.io/hostname"
MAX_TERMS = 64
"""Most slots that one term of an affinity names."""


class Role(StrEnum):
    """What a pod of a job does (label `stormjib.io/role`)."""

    SLOT = "trainer"
    COORDINATOR = "coordinator"


class Type(StrEnum):
    """Types of conditions, in the order in which they are shown."""

    SUSPENDED = "Suspended"
    FEASIBLE = "Feasible"
    SCHEDULED = "Scheduled"
    RUNNING = "Running"
    DEGRADED = "Degraded"
    RECOVERING = "Recovering"
    CHECKPOINT_HEALTHY = "CheckpointHealthy"
    COMPLETE = "Complete"
    FAILED = "Failed"


def slot_pod(job: str, slot: int, attempt: int) -> str:
    return f"{job}-{slot}-{attempt}"


def coordinator_pod(job: str, incarnation: int) -> str:
    return f"{job}-coord-{incarnation}"


def service(job: str) -> str:
    return f"{job}-coord"


def network_policy(job: str) -> str:
    return job


def token_secret(job: str, uid: str) -> str:
    """The uid is in it: the Secret of a deleted job of the same name may still be there, and we may not read Secrets."""
    return f"{job}-token-{uid[:8]}"


def revision(job: str, uid: str, spec_generation: int) -> str:
    """The kept template. Uid and generation are in it, so that it can only ever hold one content."""
    return f"{job}-{uid[:8]}-{spec_generation}"


def labels(job: str, role: str, **more: object) -> dict[str, str]:
    """Labels of a child."""
    ours = {JOB: job, ROLE: role} | {f"{GROUP}/{key}": str(value) for key, value in more.items()}
    return ours | {
        "app.kubernetes.io/name": "stormjib-job",
        "app.kubernetes.io/instance": job,
        "app.kubernetes.io/component": role,
        "app.kubernetes.io/part-of": "stormjib",
        "app.kubernetes.io/managed-by": FIELD_MANAGER,
    }
