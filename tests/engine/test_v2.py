"""The V2 engine under Triton's interpreter, in processes of its own: see tests/engine/v2*.py.

docs/v2-matrix.md lists the scenarios, and this test compares the names.
The scenarios called `control` take a part of the engine out and see the text change.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

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
    ("settings", "medusa", "host", "gpu"): "v2_settings",
}
"""Groups that share a process and its engines, and their module, about the longest first."""
MATRIX = (ROOT / "docs/v2-matrix.md").read_text()


def run_groups(groups: tuple[str, ...]) -> dict[str, str]:
    """How each scenario of the groups ended, by name."""
    command = [sys.executable, "-m", f"tests.engine.{PROCESSES[groups]}", *groups]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in ended.stdout.splitlines() if line.startswith(RESULT)]
    assert lines, ended.stdout[-2000:] + ended.stderr[-4000:]
    return json.loads(lines[-1].removeprefix(RESULT))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("groups", PROCESSES, ids="+".join)
def test_scenarios(groups: tuple[str, ...]) -> None:
    outcomes = run_groups(groups)
    failed = {name: said for name, said in outcomes.items() if said != "ok"}
    assert not failed, "\n\n".join(f"{name}\n{said}" for name, said in failed.items())
    listed = re.findall(rf"`((?:{'|'.join(groups)}): [^`]+)`", MATRIX)
    assert set(outcomes) == set(listed)
