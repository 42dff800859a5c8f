"""Object stores by fsspec's s3fs, for those who have it set up already: several times the processor time of obstore.

Its own files are not used, because closing one after an exception completes the upload. Memory: a part is copied for each writer that
sends one, up to eight of 16 MiB; a read holds its bytes once more.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    NoCredentialsError,
)

from stormjib_checkpoint.errors import NotThere, StorageError
from stormjib_checkpoint.stores import refusals
from stormjib_checkpoint.stores.parts import Parts, part_bytes
from stormjib_checkpoint.stores.refusals import Refusal
from stormjib_checkpoint.stores.store import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s3fs import S3FileSystem  # type: ignore[import-untyped]

_MANY = 1000
"""Objects that one request deletes."""
_COLLISION = ("PreconditionFailed", "ConditionalRequestConflict", "409", "412")


class S3fs:
    """A bucket behind a file system of s3fs."""

    def __init__(self, system: S3FileSystem, bucket: str) -> None:
        self._system, self._bucket = system, bucket

    def call(self, operation: str, key: str, **fields: Any) -> dict[str, Any]:
        """One request of S3 about `key`, as boto3 names it. Raises StorageError."""
        if key:
            fields["Key"] = key
        try:
            return dict(self._system.call_s3(operation, Bucket=self._bucket, **fields))
        except (OSError, BotoCoreError, ClientError) as error:
            raise refusals.error(f"s3://{self._bucket}/{key}", _refusal(error)) from None

    def put(self, key: str, data: bytes, token: str) -> bool:
        try:
            self.call("put_object", key, Body=data, IfNoneMatch="*", Metadata={TOKEN: token})
        except StorageError as error:
            if error.problem.partition(",")[0] not in _COLLISION:
                raise
            return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        self.call("put_object", key, Body=data)

    def owner(self, key: str) -> str | None:
        try:
            return str(self.call("head_object", key)["Metadata"].get(TOKEN, ""))
        except NotThere:
            return None

    def size(self, key: str) -> int:
        return int(self.call("head_object", key)["ContentLength"])

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        try:
            buffer[:] = self._system.cat_file(f"{self._bucket}/{key}", start=offset, end=offset + len(buffer))
        except (OSError, BotoCoreError, ClientError) as error:
            raise refusals.error(f"s3://{self._bucket}/{key}", _refusal(error)) from None

    def names(self, prefix: str) -> list[str]:
        found: list[str] = []
        for page in self._pages(
            "list_objects_v2", prefix, "ContinuationToken", "NextContinuationToken", Delimiter="/"
        ):
            found += [entry["Prefix"].removesuffix("/") for entry in page.get("CommonPrefixes", ())]
            found += [entry["Key"] for entry in page.get("Contents", ())]
        return [key[len(prefix) :] for key in found]

    def delete(self, keys: list[str]) -> None:
        for start in range(0, len(keys), _MANY):
            objects = [{"Key": key} for key in keys[start : start + _MANY]]
            answer = self.call("delete_objects", "", Delete={"Objects": objects, "Quiet": True})
            for failed in answer.get("Errors", ()):
                raise refusals.error(f"s3://{self._bucket}/{failed['Key']}", Refusal(failed["Code"]))

    def upload(self, key: str, size: int, token: str) -> _Upload:
        return _Upload(self, key, size, token)

    def forget_uploads(self, prefix: str) -> None:
        for page in self._pages("list_multipart_uploads", prefix, "KeyMarker", "NextKeyMarker"):
            for upload in page.get("Uploads", ()):
                with contextlib.suppress(NotThere):
                    self.call("abort_multipart_upload", upload["Key"], UploadId=upload["UploadId"])

    def _pages(
        self, operation: str, prefix: str, mark: str, following: str, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        while True:
            page = self.call(operation, "", Prefix=prefix, **fields)
            yield page
            if not page.get("IsTruncated"):
                return
            fields[mark] = page[following]


class _Upload:
    """Parts are numbered, so each writer sends its own, in any order."""

    def __init__(self, client: S3fs, key: str, size: int, token: str) -> None:
        self._client, self._key = client, key
        self._parts = Parts(size, part_bytes(size))
        self._tags: dict[int, str] = {}
        self._lock = threading.Lock()
        self._id = client.call("create_multipart_upload", key, Metadata={TOKEN: token})["UploadId"]

    @property
    def whole(self) -> bool:
        return self._parts.whole

    def write(self, offset: int, data: memoryview) -> None:
        for part in self._parts.put(offset, data):
            body = bytes(part.source[part.start : part.end])
            number = part.number + 1
            answer = self._client.call(
                "upload_part", self._key, UploadId=self._id, PartNumber=number, Body=body
            )
            with self._lock:
                self._tags[number] = answer["ETag"]

    def complete(self) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._tags.items())]
        self._client.call(
            "complete_multipart_upload", self._key, UploadId=self._id, MultipartUpload={"Parts": parts}
        )

    def abort(self) -> None:
        with contextlib.suppress(StorageError):
            self._client.call("abort_multipart_upload", self._key, UploadId=self._id)


def _refusal(error: BaseException) -> Refusal:
    """The store's word for it, from the error that s3fs has made another of."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        code = str(cause.response.get("Error", {}).get("Code", ""))
        return Refusal(code, int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)))
    if isinstance(error, NoCredentialsError) or isinstance(cause, NoCredentialsError):
        return Refusal(
            refusals.NO_CREDENTIALS, text="there are none in the environment, and no identity of this machine"
        )
    if isinstance(error, FileNotFoundError):
        return Refusal(status=404)
    return Refusal(text=type(error).__name__)
