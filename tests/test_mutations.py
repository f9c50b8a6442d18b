"""The list of faults does not rot: each text is still in its file exactly once, and what takes its place still parses.
That they are caught is for `python tests/mutation_check.py` to say, which takes minutes.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutation_check import _PROCESSES, FAULTS, ROOT, Copy, Fault, read_faults

ALL = read_faults(FAULTS.read_text())


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_each_fault_still_fits(fault: Fault) -> None:
    right = (ROOT / fault.file).read_text()
    wrong = fault.wrong(right)
    assert wrong != right
    assert fault.harm
    if fault.file.endswith(".py"):
        assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right)), "it changes nothing that runs"
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text()


def test_there_are_enough_in_all_parts() -> None:
    assert len(ALL) >= 60
    parts = {fault.file.removeprefix("star_fast/").split("/")[0] for fault in ALL}
    assert parts >= {"csrc", "data", "evaluation", "generation", "method", "model", "ops", "planning", "training"}


def test_a_text_that_is_gone_or_twice_there_is_refused() -> None:
    fault = Fault("name", "harm", "a.py", ("tests/a.py",), "x = 1", "x = 2")
    assert fault.wrong("x = 1\n") == "x = 2\n"
    for text in ("x = 3\n", "x = 1\nx = 1\n"):
        with pytest.raises(ValueError, match="expected once"):
            fault.wrong(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("@@ a.py\ntests: t.py\n# one: harm\n+ new", "needs a file, tests and a text"),
        ("tests: t.py\n# one: harm\n- old", "needs a file, tests and a text"),
        ("@@ a.py\n# one: harm\n- old", "needs a file, tests and a text"),
        ("@@ a.py\ntests: t.py\n# one: harm\n- old\n# one: harm\n- old", "twice"),
        ("?", "expected @@"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_faults(text)


@pytest.mark.parametrize(
    ("body", "verdict"),
    [
        ("def test_it():\n    assert True\n", "survived"),
        ("def test_it():\n    assert 1 == 2\n", "caught"),
        ("def test_it():\n    raise ValueError('shapes')\n", "caught"),
        ("def test_it():\n    import there_is_no_such_module\n", "badly made"),
        ("import there_is_no_such_module\n", "badly made"),
        ("def test_it(:\n", "badly made"),
        ("", "badly made"),
    ],
)
def test_verdicts(tmp_path: Path, body: str, verdict: str) -> None:
    """Only a test that ran and failed catches a fault."""
    _PROCESSES.set_forkserver_preload([])  # no torch for these
    copy = Copy(tmp_path, [])
    (tmp_path / "test_it.py").write_text(body)
    outcome = copy.test(["test_it.py"])
    assert outcome.verdict == verdict
    assert verdict != "caught" or outcome.by == "test_it.py::test_it"
