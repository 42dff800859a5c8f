"""Checkpoints in a real S3 server: what every storage promises, refusals at start, and faults in mid-upload."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from fakes.gateway import KEY, SECRET, Gateway, Moody, environment, gateway, moody, toxics
from fakes.storage_promises import MIB, StoragePromises
from fakes.training import train
from stormjib_checkpoint.commands import app
from stormjib_checkpoint.engine import Engine
from stormjib_checkpoint.errors import NotThere, StorageDenied, StorageError
from stormjib_checkpoint.history import newest
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.stores import urls
from stormjib_checkpoint.stores.urls import Patience, open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stormjib_checkpoint.storage import Storage

# With nothing cached the server is built first, which takes two minutes beside other work.
pytestmark = pytest.mark.timeout(900)
SCHEMES = ("s3", "fsspec+s3")
IMPATIENT = Patience(2.0, 1.0)
SIZE = 18 * MIB  # two parts
SOON_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(autouse=True)
def known(server: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, server.address)


@pytest.fixture
def bucket(server: Gateway) -> str:
    return server.bucket()


@pytest.fixture(params=SCHEMES)
def url(request: pytest.FixtureRequest, bucket: str) -> str:
    return f"{request.param}://{bucket}/team/job"


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)


class TestObstore(StoragePromises):
    scheme = "s3"

    @pytest.fixture
    def open_place(self, bucket: str) -> Callable[[], Storage]:
        return lambda: open_storage(f"{self.scheme}://{bucket}/team/job")

    @pytest.fixture
    def both(
        self, open_place: Callable[[], Storage], server: Gateway, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[Storage, Storage]]:
        """versitygw looks for the object and then writes it; behind this proxy that is one thing, as it is on S3."""
        with moody(server.address) as (_, address):
            use(monkeypatch, address)
            yield open_place(), open_place()


class TestS3fs(TestObstore):
    scheme = "fsspec+s3"


def test_both_clients_read_each_others_steps(bucket: str) -> None:
    one, other = (open_storage(f"{scheme}://{bucket}/job") for scheme in SCHEMES)
    open_generation(one, "1.1", "uid")
    first = train(one, "1.1", 0, 10)
    second = train(other, "1.1", 10, 20)
    assert newest(one) == newest(other) == second > first


def test_parts_are_sent_from_the_memory_that_they_lie_in(bucket: str) -> None:
    storage, data = open_storage(f"s3://{bucket}/job"), memoryview(bytes(48 * MIB))
    tracemalloc.start()
    try:
        with storage.new("big", len(data)) as file:
            for start in range(0, len(data), 16 * MIB):
                file.write(start, data[start : start + 16 * MIB])
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


PRIORITIES = """
import os, sys
from stormjib_checkpoint.stores.urls import open_storage
before = set(os.listdir("/proc/self/task"))
open_storage(sys.argv[1]).create("a", [b""])
started = set(os.listdir("/proc/self/task")) - before
print(os.getpriority(os.PRIO_PROCESS, 0), sorted({os.getpriority(os.PRIO_PROCESS, int(task)) for task in started}))
"""


def test_the_threads_of_a_client_give_way_to_training(url: str) -> None:
    words = [sys.executable, "-c", PRIORITIES, url]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=SOON_S)
    mine = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert (done.stdout, done.stderr) == (f"{mine} [{max(mine, urls.NICE)}]\n", "")


def test_the_commands_take_a_url(url: str) -> None:
    storage = open_storage(url)
    open_generation(storage, "1.1", "uid")
    for step in (10, 20, 30):
        train(storage, "1.1", step - 10, step)
    assert "20" in run("ls", url)
    assert "step 30 of generation 1.1 is whole" in run("verify", url)
    assert "step-00000010/g1.1\n1 saves deleted" in run("gc", url)
    assert storage.names("step-00000010") == []
    assert "nothing new" in run("finish", url)


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output


# --- refused at start -------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """At start too, so that the tests are short."""
    monkeypatch.setattr(urls, "AT_START", Patience(2.0, 1.0))


def refused(url: str, kind: type[StorageError], words: str) -> None:
    """Making an engine fails in time, with the URL and the fix, and shows no secret, nor does the traceback."""
    began = time.monotonic()
    with pytest.raises(StorageError, match=words) as caught:
        Engine(url, generation="1.1")
    assert time.monotonic() - began < urls.PROBE_S + 5
    assert type(caught.value) is kind
    text = "".join(traceback.format_exception(caught.value))
    assert url.partition("://")[2].partition("/")[0] in str(caught.value)
    assert SECRET not in text
    assert "AWS4-HMAC" not in text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bucket_that_does_not_exist_is_refused_at_start(scheme: str) -> None:
    refused(f"{scheme}://no-such-bucket/x", StorageError, r"no-such-bucket.*NoSuchBucket.*Create the bucket")


def test_wrong_credentials_are_refused_at_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET[::-1])
    refused(url, StorageDenied, "SignatureDoesNotMatch.*Give valid credentials")


@pytest.mark.usefixtures("hasty")
def test_no_credentials_are_refused_at_start(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused(url, StorageDenied, "NoCredentials.*there are none in the environment.*Give valid credentials")


@pytest.mark.usefixtures("hasty")
def test_where_nothing_listens_it_is_refused_at_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    refused(url, StorageError, "Look at the health of the store, and whether it can be reached")


def test_a_store_that_may_only_be_read_is_refused_by_who_writes(
    url: str, server: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_generation(open_storage(url), "1.1", "uid")
    with moody(server.address) as (proxy, address):
        use(monkeypatch, address)
        proxy.answer("^PUT ", 403, "AccessDenied")
        refused(url, StorageDenied, "AccessDenied")
        assert proxy.fired
        assert "step" in run("ls", url)  # reading is allowed


def test_the_agents_child_refuses_at_start(bucket: str) -> None:
    assert "Create the bucket" in child("s3://no-such-bucket/x").stderr
    assert child(f"s3://{bucket}/x").stdout == '{"id":1,"storage":null}\n'


def child(url: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "stormjib_checkpoint.child", url]
    scan = '{"id":1,"do":"scan"}\n'
    return subprocess.run(words, input=scan, check=False, capture_output=True, text=True, timeout=SOON_S)


# --- faults in mid-upload ---------------------------------------------------------------------------------------------


class Job:
    """An engine that saves one tensor of several parts, whose values say the step."""

    def __init__(self, storage: Storage) -> None:
        self.engine = Engine(storage)
        self.table = torch.zeros(SIZE // 4, dtype=torch.int32)

    def save(self, step: int) -> BaseException | None:
        """Save a step; why it is not there."""
        torch.arange(step, step + len(self.table), out=self.table)
        save = self.engine.async_save({"table": self.table}, step=step)
        return save.upload_completion.exception(SOON_S)


def assert_newest(url: str, step: int) -> None:
    """The newest step is there bit for bit, for whoever starts now."""
    engine = Engine(url)
    table = torch.zeros(SIZE // 4, dtype=torch.int32)
    assert engine.load({"table": table}) is not None
    assert torch.equal(table, torch.arange(step, step + len(table), dtype=torch.int32))
    engine.close()


def through_a_fault(
    url: str, job: Job, begin: Callable[[], object], end: Callable[[], object], told: str
) -> None:
    """Step 1 is there, step 2 meets the fault and is not, step 1 loads, and step 3 is there again."""
    assert job.save(1) is None
    begin()
    error = job.save(2)
    end()
    assert isinstance(error, StorageError)
    assert told in str(error)
    assert SECRET not in str(error)
    found = newest(open_storage(url))
    assert found is not None
    assert found.step == 1
    assert job.save(3) is None
    job.engine.close()
    assert_newest(url, 3)


@pytest.fixture
def mood(server: Gateway, known: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moody]:
    with moody(server.address) as (proxy, address):
        use(monkeypatch, address)
        yield proxy


REFUSED = {
    "503 at a part": ("^PUT .*[?&]partNumber=2", 503, "SlowDown"),
    "credentials expire": ("^PUT .*[?&]partNumber=2", 400, "ExpiredToken"),
    "503 at the end": ("^POST .*[?&]uploadId=", 503, "SlowDown"),
    "500 at the record": ("^PUT .*rank-00000.json", 500, "InternalError"),
}


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [
        *(("s3", fault) for fault in REFUSED),
        ("fsspec+s3", "credentials expire"),
        ("fsspec+s3", "503 at the end"),
    ],
)
def test_a_store_that_refuses_in_mid_upload_costs_the_step_and_nothing_else(
    bucket: str, mood: Moody, scheme: str, fault: str
) -> None:
    url = f"{scheme}://{bucket}/job"
    request, status, code = REFUSED[fault]
    job = Job(open_storage(url, patience=IMPATIENT))
    through_a_fault(url, job, lambda: mood.answer(request, status, code), mood.clear, code)
    assert mood.fired


def test_a_few_refusals_are_asked_again_and_cost_nothing(url: str, mood: Moody) -> None:
    job = Job(open_storage(url))
    mood.answer("partNumber=", 503, "SlowDown", times=2)
    assert job.save(1) is None
    job.engine.close()
    assert mood.fired == 2
    assert_newest(url, 1)


@pytest.mark.parametrize(
    ("toxic", "attributes", "told"),
    [("limit_data", {"bytes": 4 * MIB}, "connection"), ("timeout", {"timeout": 0}, "no answer in time")],
    ids=["connections are cut", "a black hole"],
)
def test_a_network_that_breaks_in_mid_upload_costs_the_step_and_nothing_else(
    bucket: str,
    server: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toxic: str,
    attributes: dict[str, int],
    told: str,
) -> None:
    url = f"s3://{bucket}/job"
    with toxics(tmp_path, server.address) as proxy:
        use(monkeypatch, proxy.address)
        job = Job(open_storage(url, patience=IMPATIENT))
        through_a_fault(url, job, lambda: proxy.add(toxic, **attributes), proxy.clear, told)


def test_a_slow_store_is_waited_for(
    bucket: str, server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/job"
    with toxics(tmp_path, server.address) as proxy:
        use(monkeypatch, proxy.address)
        job = Job(open_storage(url))
        proxy.add("bandwidth", rate=10_000)  # KB/s for each connection
        began, before = time.monotonic(), proxy.received()
        assert job.save(1) is None
        assert proxy.received() - before > SIZE
        assert time.monotonic() - began > 16 * MIB / 10_000_000 / 2  # a part alone takes longer
        job.engine.close()
        assert_newest(url, 1)


def test_an_upload_that_fails_is_aborted(url: str, bucket: str, server: Gateway, mood: Moody) -> None:
    storage = open_storage(url, patience=IMPATIENT)
    mood.answer("partNumber=3", 403, "AccessDenied")
    data = memoryview(bytes(16 * MIB))

    def upload() -> None:
        with storage.new("big", 3 * len(data)) as file:
            for number in range(3):
                file.write(number * len(data), data)

    with pytest.raises(StorageDenied):
        upload()
    assert mood.fired
    assert storage.names("") == []
    assert server.unfinished(bucket) == []


KILLED = """
import os, sys
from stormjib_checkpoint.stores.urls import open_storage
storage, data = open_storage(sys.argv[1]), memoryview(bytes(16 << 20))
with storage.new("step/g1.1/big", 3 * len(data)) as file:
    file.write(0, data)
    print("sent", flush=True)
    sys.stdin.read()
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(url: str, bucket: str, server: Gateway) -> None:
    words = [sys.executable, "-c", KILLED, url]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"sent\n"
        assert server.unfinished(bucket)
        process.send_signal(signal.SIGKILL)
    storage = open_storage(url)
    assert storage.names("step/g1.1") == []
    with pytest.raises(NotThere):
        storage.read("step/g1.1/big", 10)
    storage.remove_folder("step/g1.1")
    storage.create("step/g1.1/big", [b"anew"])
    # What a lifecycle rule is for where the client cannot list uploads.
    assert bool(server.unfinished(bucket)) == url.startswith("s3:")


def test_nothing_of_the_credentials_is_logged(
    url: str, mood: Moody, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(open_storage(url, patience=IMPATIENT))
    mood.answer("partNumber=", 403, "SignatureDoesNotMatch")
    with caplog.at_level(logging.WARNING):
        assert job.save(1) is not None
        job.engine.close()
    assert mood.fired
    assert "step 1 is not saved" in caplog.text
    for secret in (SECRET, KEY, "AWS4-HMAC"):
        assert secret not in caplog.text
