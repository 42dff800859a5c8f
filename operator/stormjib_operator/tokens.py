"""The two tokens of a job, made from one key that only the operator's namespace holds.

Bound to the job and to no incarnation, because agents outlive coordinators. The key is made once, by the operator and
never by a chart: a template that makes a secret makes a new one with every upgrade.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

from stormjib_operator.errors import Conflict
from stormjib_operator.observed import Tokens

if TYPE_CHECKING:
    from stormjib_operator.cluster import Cluster

KEY_SECRET = "stormjib-key"
_FIELD = "key"


def derive(key: bytes, uid: str) -> Tokens:
    """What agents and the operator show to the coordinator of the job of that uid."""
    return Tokens(agent=_sign(key, f"{uid}/agent"), operator=_sign(key, f"{uid}/operator"))


def _sign(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


async def ensure_key(cluster: Cluster, namespace: str) -> bytes:
    """The key, made if it is not there; two operators that start together end with the same one."""
    found = await cluster.get("Secret", namespace, KEY_SECRET)
    if found is None:
        content = {_FIELD: base64.b64encode(secrets.token_bytes(32)).decode()}
        meta = {"name": KEY_SECRET, "namespace": namespace}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": content}
        try:
            found = await cluster.create(secret)
        except Conflict:
            found = await cluster.get("Secret", namespace, KEY_SECRET)
    if found is None:
        return await ensure_key(cluster, namespace)  # deleted between two requests: once more
    return base64.b64decode(found["data"][_FIELD])
