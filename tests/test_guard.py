"""guard, errors and records: whatever ends a command is one line, whatever a name holds is printable, whatever a record
holds has its field's type.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from star_fast.errors import AgreedError, ConfigError, UserError, printable
from star_fast.guard import guarded
from star_fast.records import from_dict, to_dict

ROOT = Path(__file__).resolve().parents[1]


def failing(error: BaseException):
    def job() -> None:
        raise error

    return job


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("STAR_FAST_DEBUG", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb\x1b[31m"), 2, "error: a\\nb\\x1b[31m"),
        (ConfigError("model.width: no"), 2, "error: model.width: no"),
        (KeyboardInterrupt("the same command goes on"), 130, "interrupted: the same command goes on"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "there"), 2, "error: there: Permission denied (traceback in {tmp}"),
        (MemoryError(), 2, "error: out of memory; give the machine more, or ask for smaller sizes (traceback in {tmp}"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            2,
            "error: out of memory;",
        ),
        (
            KeyError("x\ny"),
            70,
            "error: unexpected KeyError: 'x\\ny': a bug in star_fast, please report it (traceback in {tmp}",
        ),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    assert guarded(failing(error)) == status
    said = capsys.readouterr().err
    assert said.startswith(line.format(tmp=tmp_path))
    assert said.count("\n") == 1
    for report in tmp_path.glob("star_fast-error-*.log"):
        assert "Traceback" in report.read_text()
    assert bool(list(tmp_path.iterdir())) == ("traceback in" in said)


def test_developers_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_FAST_DEBUG", "1")
    with pytest.raises(KeyError):
        guarded(failing(KeyError("x")))


def test_of_many_ranks_the_first_speaks_for_all_and_each_for_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert (guarded(failing(AgreedError("all know"))), capsys.readouterr().err) == (2, "")
    assert (guarded(failing(UserError("mine"))), capsys.readouterr().err) == (2, "rank 3: error: mine\n")
    monkeypatch.setenv("RANK", "")
    assert (guarded(failing(UserError("RANK: no"))), capsys.readouterr().err) == (2, "error: RANK: no\n")
    monkeypatch.setenv("RANK", "0")
    assert (guarded(failing(AgreedError("all know"))), capsys.readouterr().err) == (2, "error: all know\n")


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
)
def test_a_terminal_that_knows_only_ascii(environment: dict[str, str]) -> None:
    code = (
        "import sys; from star_fast.guard import guarded; sys.exit(guarded(lambda: print('\\u03c4 \\xd7 gr\\xf6\\xdfe "
        "\\udcff')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"\\u03c4 \\xd7 gr\\xf6\\xdfe \\udcff\n"


def test_the_reader_of_a_pipe_may_leave(tmp_path: Path) -> None:
    code = "import sys; from star_fast.guard import guarded\nsys.exit(guarded(lambda: print('x\\n' * 10**6)))"
    done = subprocess.run(
        f'{sys.executable} -c "$CODE" | head -1; echo ${{PIPESTATUS[0]}}',
        shell=True,
        executable="/bin/bash",
        env={**os.environ, "CODE": code},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("x\n141\n", "")


def test_names_from_files_are_printable() -> None:
    assert printable("größe кот 猫") == "größe кот 猫"
    assert printable("a\nb\r\x1b]0;title\x07\x7f\u202e\udcff") == "a\\nb\\r\\x1b]0;title\\x07\\x7f\\u202e\\udcff"
    assert str(UserError(Path("a\nb"))) == "a\\nb"


@dataclass(frozen=True)
class Inner:
    count: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    share: float = 0.5
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    table: dict[str, list[float]] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: int | None = None
    rest: Any = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": 3}, "name: expected a value of type str, got 3"),
        ({"share": True}, "share: expected a finite number, got True"),
        ({"share": 10**400}, "share: expected a finite number, got a very large int"),
        ({"share": float("nan")}, "share: expected a finite number, got nan"),
        ({"share": "1e999"}, "share: expected a finite number"),
        ({"kind": "c"}, "kind: expected 'a' or 'b', got 'c'"),
        ({"kind": []}, "kind: expected 'a' or 'b'"),
        ({"sizes": [1, 2.5]}, r"sizes\[1\]: expected a value of type int, got 2.5"),
        ({"sizes": 3}, "sizes: expected a list, got 3"),
        ({"table": {"x": [None]}}, r"table.x\[0\]: expected a finite number, got None"),
        ({"table": []}, "table: expected a mapping by name, got list"),
        ({"inner": {"count": 2**60}}, r"inner.count: expected a whole number of at most 2\^53, got a very large int"),
        ({"inner": 7}, "inner: expected a mapping"),
        ({"inner": {"cuont": 1}}, "inner.cuont: unknown setting; known here: count"),
        ({"maybe": "3"}, "maybe: expected a value of type int, got '3'"),
        ({"x" * 10**6: 1}, "xxx...: unknown setting"),
    ],
)
def test_a_record_has_its_fields_types(change: dict[str, Any], said: str) -> None:
    good = {
        "name": "n",
        "share": "1e-4",
        "sizes": [1, 2],
        "table": {"x": [1, 2.5]},
        "inner": {"count": 2},
        "rest": [{}],
    }
    assert to_dict(from_dict(Outer, good)) == good | {"share": 1e-4, "kind": "a", "maybe": None}
    with pytest.raises(ConfigError, match=said) as caught:
        from_dict(Outer, good | change)
    assert len(str(caught.value)) < 300
    with pytest.raises(ConfigError, match="name: missing"):
        from_dict(Outer, {})
