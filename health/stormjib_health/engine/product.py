"""What the fixed product says of a rank that is suspected of being slow or wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stormjib_health.wire import Answer


def confirm_compute(suspect: Answer | None, reference: Answer | None, ratio: float) -> bool | None:
    """Whether the product on the suspect is slow or wrong beside the reference's; None where that cannot be said."""
    if suspect is None or reference is None or not (suspect.ok and reference.ok):
        return None
    if suspect.versions == reference.versions and suspect.digest != reference.digest:
        return True
    if took(reference) <= 0 or suspect.versions != reference.versions:
        return None
    return took(suspect) > ratio * took(reference)


def took(answer: Answer) -> float:
    """Seconds of the product: on a processor those that it had, because a neighbour on the same core is not the node."""
    return answer.cpu_s or answer.seconds
