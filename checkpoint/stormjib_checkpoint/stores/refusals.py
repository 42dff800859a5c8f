"""What a store answers when it refuses, as an error of ours that names the place and the fix.

Never the client's own text: the answer to a bad signature holds the request that was signed, session token and all.
"""

from __future__ import annotations

from typing import NamedTuple

from stormjib_checkpoint.errors import AlreadyThere, NotThere, StorageDenied, StorageError, StorageFull


class Refusal(NamedTuple):
    """What is known of a request that failed: the store's word for it, the HTTP status, and what else may be said."""

    code: str = ""
    status: int = 0
    text: str = ""

    @property
    def shown(self) -> str:
        parts = (self.code, f"HTTP {self.status}" if self.status else "", self.text)
        return ", ".join(part for part in parts if part) or "the request failed"


NO_CREDENTIALS = "NoCredentials"
_GONE = ("", "404", "NoSuchKey", "NotFound", "BlobNotFound")
_NO_PLACE = ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName")
_NOT_US = (
    NO_CREDENTIALS,
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "XAdminUserNotFound",
)
_FULL = ("QuotaExceeded", "XMinioStorageFull", "EntityTooLarge")


def error(place: str, refusal: Refusal) -> StorageError:
    """The error to raise for a request about `place`."""
    code, status = refusal.code, refusal.status
    if code in _NO_PLACE:
        return StorageError(place, refusal.shown, "Create the bucket, or name another checkpoint URL.")
    if code in _FULL or status == 507:
        return StorageFull(place, refusal.shown, "Free space, raise the quota, or keep fewer checkpoints.")
    if code in _NOT_US or status in (401, 403):
        return StorageDenied(
            place,
            refusal.shown,
            "Give valid credentials (environment, or the identity of the pod or machine) that may put, get, list and "
            "delete there.",
        )
    if status == 404 and code in _GONE:
        return NotThere(place, refusal.shown, "It was deleted, or never written.")
    return StorageError(
        place, refusal.shown, "Look at the health of the store, and whether it can be reached from here."
    )


def taken(place: str) -> AlreadyThere:
    """The error for a name that another writer has."""
    return AlreadyThere(
        place, "the name is taken", "It is never overwritten; take the next generation or step."
    )
