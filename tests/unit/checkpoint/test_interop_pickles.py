"""Foreign pickles are told, not obeyed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from stormjib_checkpoint.errors import ForeignRefused
from stormjib_checkpoint.interop import foreign, restricted
from stormjib_checkpoint.interop.foreign import Described, Place, describe


def written(tmp_path: Path, data: bytes) -> Place:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return Place(path)


class Calls:
    def __init__(self, what: Any, *arguments: Any) -> None:
        self.how = what, arguments

    def __reduce__(self) -> Any:
        return self.how


MARK = f"/tmp/stormjib-hostile-pickle-{os.getpid()}"
HOSTILE = {
    "posix.system": pickle.dumps(Calls(os.system, f"touch {MARK}")),
    "builtins.eval": pickle.dumps(Calls(eval, "1+1")),
    "builtins.getattr": pickle.dumps(Calls(getattr, "x", "upper")),
    "subprocess.Popen": pickle.dumps(Calls(subprocess.Popen, ["touch", MARK])),
    "torch.serialization.load": pickle.dumps({"a": [Calls(torch.load, "x")]}),
    "torch.serialization.os.system": b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93.",
    "os.system": f"cos\nsystem\n(S'touch {MARK}'\ntR.".encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_names_something_else_is_refused_by_that_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ForeignRefused, match=rf"x\.pkl: it names {name.replace('.', '[.]')};"):
        describe([written(tmp_path, HOSTILE[name])])
    assert not Path(MARK).exists()


def test_the_same_inside_an_archive_of_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Calls(os.system, f"touch {MARK}")}, tmp_path / "x.pt")
    with pytest.raises(ForeignRefused, match=r"it names posix\.system"):
        describe([Place(tmp_path / "x.pt")])
    assert not Path(MARK).exists()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".", "deeper than 64"),
        (b"\x80\x02K\x01" + b"\x85" * 200_000 + b".", "deeper than 64"),
        # Ten lists, each ten times the one before: ten billion values in a hundred bytes.
        (
            b"\x80\x02]q\x00"
            + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(10))
            + b".",
            "more than its length",
        ),
        (b"\x8a\xff" + b"\x00" * 4 + b".", "Error"),
        (b"B\xff\xff\xff\x7fxx.", r"Error|memory"),  # two gigabytes, it says
        (b"\x8e" + (2**62).to_bytes(8, "little") + b".", r"Error|memory"),
        (b"\x80\x04\x95", "Error"),
        (b"", "Error"),
        (b"PK\x03\x04" + b"\x00" * 100, "BadZipFile"),
        (b"\x82\x01.", "ValueError"),  # a registered extension
        (b"Pstorage\n.", "no storage of torch"),
        (b"\x80\x02ctorch\nSize\n(]tR.", None),
        (b"\x80\x02ctorch\nSize\n((lp0\nS'x'\natR.", r"no numbers|Error"),
    ],
)
def test_damage_and_bombs_end_in_one_line(tmp_path: Path, data: bytes, why: str | None) -> None:
    if why is None:
        assert describe([written(tmp_path, data)]) == [()]
        return
    with pytest.raises(ForeignRefused, match=why):
        describe([written(tmp_path, data)])


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of a megabyte that asks for a gigabyte: its reader meets its limit, not the machine's."""
    monkeypatch.setattr(foreign, "MEMORY_BYTES", 200 << 20)
    text = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20)
    data = b"\x80\x02" + text + b"q\x000](" + b"c_codecs\nencode\nh\x00\x85R" * 1000 + b"e."
    with pytest.raises(ForeignRefused, match=r"more memory|its reader ended"):
        describe([written(tmp_path, data)])


def test_a_reader_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "TIMEOUT_S", 0.3)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignRefused, match="not read in"):
        describe([Place(tmp_path / "pipe")])


def test_the_reader_has_no_environment_and_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import os, sys, json\nlines = list(sys.stdin)\n"
        "for line in lines: print(json.dumps({'value': [list(os.environ), 'site' in sys.modules]}))\n"
    )
    monkeypatch.setattr(restricted, "__file__", str(spy))
    ((names, site),) = describe([Place(tmp_path / "x")])
    assert set(names) <= {"LC_CTYPE"}
    assert not site
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import stormjib_checkpoint.interop.restricted"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_values_and_tensors_are_told_as_they_are(tmp_path: Path) -> None:
    w = torch.arange(12.0).reshape(3, 4)
    value = OrderedDict(
        w=w[1:], p=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), n=(1, 2.5, None, True), i=float("inf"),
        d={3: "x"}, t=torch.float16, b=b"ab",
    )  # fmt: skip
    torch.save(value, tmp_path / "a.pt")
    (found,) = describe([Place(tmp_path / "a.pt")])
    assert found["n"] == (1, 2.5, None, True)
    assert (found["i"], found["d"], found["t"]) == (float("inf"), {3: "x"}, "F16")
    assert found["p"].dtype == "BF16"
    told: Described = found["w"]
    assert told.shape == (2, 4)
    raw = (tmp_path / "a.pt").read_bytes()[told.start : told.start + 32]
    assert raw == w[1:].numpy().tobytes()


def test_tensors_that_are_not_laid_out_in_order_are_refused(tmp_path: Path) -> None:
    torch.save(torch.ones(3, 4).t(), tmp_path / "a.pt")
    with pytest.raises(ForeignRefused, match="not contiguous"):
        describe([Place(tmp_path / "a.pt")])
