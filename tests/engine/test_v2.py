"""The V2 engine under Triton's interpreter, in processes of its own: see tests/engine/v2*.py.

docs/v2-matrix.md lists the scenarios, and this test compares the names.
The scenarios called `control` take a part of the engine out and see the text change.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from specplus_kernels import dispatch

from tests.engine.apart import RESULT

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation")

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = {
    ("drafter",): "v2_drafters",
    ("processes",): "v2_processes",
    ("schedule", "feature", "triton", "control"): "v2",
    ("experts",): "v2_drafters",
    ("width",): "v2_width",
    ("settings", "medusa"): "v2_settings",
    ("gpu",): "v2_gpu",
}
"""Groups that share a process and its engines, and their module, the longest first."""
GROUPS = [group for groups in PROCESSES for group in groups]
MATRIX = (ROOT / "docs/v2-matrix.md").read_text()


_waiting = deque(PROCESSES)
_running: set[subprocess.Popen] = set()
_outcomes: dict[str, str] = {}
_workers: list[Thread] = []


def begin() -> None:
    """Has one more core work through the groups; `tests/conftest.py` calls this in whole suites."""
    _workers.append(Thread(target=_work, daemon=True))
    _workers[-1].start()


def _work() -> None:
    with suppress(IndexError):  # none is left
        while True:
            _outcomes.update(run_groups(_waiting.popleft()))


def run_groups(groups: tuple[str, ...]) -> dict[str, str]:
    """How each scenario of the groups ended."""
    command = [sys.executable, "-m", f"tests.engine.{PROCESSES[groups]}", *groups]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        _running.add(process)
        stdout, stderr = process.communicate()
        _running.discard(process)
    lines = [line for line in stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return dict.fromkeys(groups, stdout[-2000:] + stderr[-4000:])
    return json.loads(lines[-1].removeprefix(RESULT))


@atexit.register
def _leave_nothing_running() -> None:
    _waiting.clear()
    for process in list(_running):
        process.terminate()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Of all scenarios; two processes run at a time, each on one core."""
    while len(_workers) < 2:
        begin()
    for worker in _workers:
        worker.join()
    return _outcomes


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("group", GROUPS)
def test_scenarios(group: str, outcomes: dict[str, str]) -> None:
    ended = {name: said for name, said in outcomes.items() if name.split(":")[0] == group}
    failed = {name: said for name, said in ended.items() if said != "ok"}
    assert not failed, "\n\n".join(f"{name}\n{said}" for name, said in failed.items())
    assert set(ended) == set(re.findall(rf"`({group}: [^`]+)`", MATRIX))
