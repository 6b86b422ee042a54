"""The V2 engine under Triton's interpreter, in processes of its own: see tests/engine/v2.py.

The scenarios called `control` take a part of the engine out and see the text change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from specplus_kernels import dispatch

from tests.engine.apart import RESULT

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("group", "at_least"), [("feature", 30), ("schedule", 13), ("control", 3), ("triton", 4)]
)
def test_scenarios(group: str, at_least: int) -> None:
    command = [sys.executable, "-m", "tests.engine.v2", group]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    outcomes = json.loads(lines[-1].removeprefix(RESULT))
    failed = {name: said for name, said in outcomes.items() if said != "ok"}
    assert not failed, "\n\n".join(f"{name}\n{said}" for name, said in failed.items())
    assert len(outcomes) >= at_least
