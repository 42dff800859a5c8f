"""What the checkpoint storage puts into a slot's pod: root, volumes, credentials, the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.job import IP, RENDER, job
from stormjib_checkpoint.keys import KEY_FILE
from stormjib_operator import pods, see
from stormjib_operator.spec import ObjectStore
from stormjib_operator.storage import CREDENTIALS
from stormjib_runtime.wire import Env

CLAIM = {"persistentVolumeClaim": {"claimName": "disk"}}
KEY = {"secretName": "k", "key": "hmac"}


DOCS = Path(__file__).resolve().parents[3] / "docs/stores.md"


def store(url: str = "s3://bucket/team", **more: str) -> dict[str, Any]:
    return {"storage": {"objectStore": {"url": url, **more}}}


def slot(checkpoint: dict[str, Any], env: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The pod of a slot of the job ns/j."""
    trainer = {"name": "trainer", "image": "my/image:1", "env": env or []}
    made = job(checkpoint=checkpoint, template={"spec": {"containers": [trainer]}})
    return pods.slot_pod(made, pods.render(made, RENDER)[0], 1, 2, IP)


def environment(checkpoint: dict[str, Any], *env: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its trainer's environment; no name comes twice."""
    every = slot(checkpoint, list(env))["spec"]["containers"][0]["env"]
    found = {each["name"]: each for each in every}
    assert len(found) == len(every)
    return found


def from_secret(env: dict[str, dict[str, Any]], secret: str) -> dict[str, bool]:
    """Variables out of that Secret -> whether they may be missing."""
    refs = {name: each.get("valueFrom", {}).get("secretKeyRef", {}) for name, each in env.items()}
    mine = {name: ref for name, ref in refs.items() if ref.get("name") == secret}
    assert all(ref["key"] == name for name, ref in mine.items())
    return {name: ref.get("optional", False) for name, ref in mine.items()}


@pytest.mark.parametrize("url", ["s3://bucket/team", "s3://bucket/team/"])
def test_two_jobs_with_one_url_have_a_folder_each_as_on_a_claim(url: str) -> None:
    assert environment(store(url))[Env.CHECKPOINT_ROOT]["value"] == "s3://bucket/team/ns/j"
    on_claim = environment({"storage": CLAIM})[Env.CHECKPOINT_ROOT]["value"]
    assert on_claim == "/stormjib/storage/ns/j"


def test_a_store_mounts_nothing() -> None:
    volumes = {each["name"] for each in slot(store(secretName="s"))["spec"]["volumes"]}
    assert not volumes & {"stormjib-storage", "stormjib-keys"}


def test_without_a_secret_the_identity_of_the_pod_counts() -> None:
    assert not [name for name in environment(store()) if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]


def test_only_credentials_of_that_kind_of_store_come_out_of_the_secret() -> None:
    assert from_secret(environment(store(secretName="s")), "s") == {
        "AWS_ACCESS_KEY_ID": False,
        "AWS_SECRET_ACCESS_KEY": False,
        "AWS_SESSION_TOKEN": True,
        "AWS_REGION": True,
        "AWS_DEFAULT_REGION": True,
        "AWS_ENDPOINT_URL": True,
        "AWS_ENDPOINT_URL_S3": True,
    }
    google = from_secret(environment(store("gs://bucket", secretName="s")), "s")
    assert google == {"GOOGLE_SERVICE_ACCOUNT_KEY": False}
    azure = from_secret(environment(store("az://box", secretName="s")), "s")
    assert [name for name, may_miss in azure.items() if not may_miss] == ["AZURE_STORAGE_ACCOUNT_NAME"]
    assert all(name.startswith("AZURE_") for name in azure)


def test_no_container_takes_a_whole_secret_and_no_name_is_the_loaders_or_ours() -> None:
    spec = slot(store(secretName="s"))["spec"]
    assert not [each for each in (*spec["initContainers"], *spec["containers"]) if "envFrom" in each]
    names = [name for each in CREDENTIALS.values() for name in (*each.needed, *each.optional)]
    assert not [name for name in names if not name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]


def test_what_the_template_names_itself_stays_the_templates() -> None:
    given = {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"}
    env = environment(store(secretName="s"), given)
    assert env["AWS_ENDPOINT_URL"] == given
    assert "AWS_ENDPOINT_URL" not in from_secret(env, "s")


def test_the_signing_key_is_a_file_of_the_trainers_container_alone_that_its_user_can_read() -> None:
    pod = slot({"storage": CLAIM, "signingKey": KEY})
    volume = next(each for each in pod["spec"]["volumes"] if each["name"] == "stormjib-keys")
    items = [{"key": "hmac", "path": "checkpoint"}]
    assert volume["secret"] == {"secretName": "k", "items": items, "defaultMode": 0o444}
    mounts = [
        each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == "stormjib-keys"
    ]
    assert mounts == [{"name": "stormjib-keys", "mountPath": "/stormjib/keys", "readOnly": True}]
    assert "stormjib-keys" not in str(pod["spec"]["initContainers"])


def test_the_library_finds_the_key_where_the_pod_has_it_whatever_the_template_says() -> None:
    assert Env.CHECKPOINT_KEY_FILE == KEY_FILE
    theirs = {"name": KEY_FILE, "value": "/elsewhere"}
    env = environment({"storage": CLAIM, "signingKey": KEY}, theirs)
    assert env[KEY_FILE]["value"] == "/stormjib/keys/checkpoint"
    assert environment({"storage": CLAIM}, theirs)[KEY_FILE] == theirs


def test_the_example_of_the_docs_holds_every_needed_key_and_only_what_is_let_through() -> None:
    """Its words are those of the schema: whatever the schema does not know would be lost when it is read and written again."""
    text = re.findall(r"^```yaml\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    secret, manifest = yaml.safe_load_all("".join(text))
    manifest["metadata"] |= {"namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "1"}
    spec = see.see_job(manifest).spec
    assert spec.checkpoint is not None
    given = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert given == {key: manifest["spec"][key] for key in given}
    found = spec.checkpoint.storage.object_store
    assert found is not None
    assert found.secret_name == secret["metadata"]["name"]
    allowed = CREDENTIALS[found.scheme]
    assert set(allowed.needed) <= set(secret["stringData"]) <= {*allowed.needed, *allowed.optional}


@pytest.mark.parametrize("scheme", CREDENTIALS)
def test_the_docs_and_explain_name_every_variable_of_the_list(scheme: str) -> None:
    told = str(ObjectStore.model_fields["secret_name"].description)
    row = next(line for line in DOCS.read_text().splitlines() if f"`{scheme}://`" in line and "_KEY" in line)
    for name in (*CREDENTIALS[scheme].needed, *CREDENTIALS[scheme].optional):
        assert name in told
        assert f"`{name}`" in row
