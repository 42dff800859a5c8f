"""`stormjib health`: what people see, with a kubectl that prints what the API server would."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from stormjib_operator.commands import app

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VERDICT = {
    "id": 1,
    "generation": "1.1",
    "syndrome": "NonCommunicationHang",
    "scope": "Rank",
    "culprits": [5],
    "confidencePercent": 95,
    "confirmed": True,
    "detectionMilliseconds": 1210,
    "evidence": [{"name": "issued", "who": "rank 5", "value": "1,204", "others": "1,205"}],
    "stack": "main: stopped",
}
FAULT = {
    "generation": "1.2",
    "time": "2027-01-15T08:00:00Z",
    "cause": "RankHang",
    "slot": 2,
    "rank": 5,
    "nodeName": "node-3",
    "message": "rank 5 [of dp] is stopped",
    "verdict": VERDICT,
}


def job(*faults: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "tiny"}, "status": {"faults": list(faults)}}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a kubectl on the path that prints these documents; the file that has its arguments."""

    def answer(*documents: object, code: int = 0) -> Path:
        said = "\n".join(json.dumps(each, indent=1) for each in documents)
        (tmp_path / "answer").write_text(said)
        program = tmp_path / "kubectl"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat {tmp_path}/answer\nexit {code}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return tmp_path / "words"

    return answer


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_explain_says_who_and_why(kubectl: Callable[..., Path]) -> None:
    words = kubectl(job(FAULT))
    code, text = run("explain", "tiny", "-n", "team")
    assert code == 0
    assert "RankHang, rank 5, slot 2 on node-3: rank 5 [of dp] is stopped" in text
    assert "Rank [5]; 95 %, confirmed; found in 1.21 s" in text
    assert [row.split() for row in text.splitlines() if "issued" in row] == [
        ["issued", "rank", "5", "1,204", "1,205"]
    ]
    assert "main: stopped" in text
    assert words.read_text().split() == [
        "get",
        "trainingjobs",
        "--output",
        "json",
        "tiny",
        "--namespace",
        "team",
    ]


def test_explain_of_a_fault_that_is_not_there_names_those_that_are(kubectl: Callable[..., Path]) -> None:
    kubectl(job(FAULT))
    code, text = run("explain", "tiny", "3")
    assert code == 2
    assert "fault 3 is not there; tiny has 0 to 0" in " ".join(text.replace("│", " ").split())


def test_watch_says_each_fault_once_the_oldest_first(kubectl: Callable[..., Path]) -> None:
    old = FAULT | {"time": "2027-01-15T07:00:00Z", "verdict": None, "cause": "RankExit", "message": "exit 1"}
    kubectl({"items": [job(old)]}, job(FAULT, old), job(FAULT, old))
    code, text = run("watch")
    assert code == 0
    lines = text.splitlines()
    assert [one.split()[2] for one in lines] == ["RankExit,", "RankHang,"]


def test_kubectls_own_failure_is_handed_on(kubectl: Callable[..., Path]) -> None:
    kubectl(code=7)
    code, _ = run("watch", "none")
    assert code == 7


def test_without_kubectl_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = run("watch")
    assert code == 2
    assert "kubectl is not there" in text
