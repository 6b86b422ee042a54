"""The V2 engine under Triton's interpreter, in processes of its own: see tests/engine/v2*.py.

docs/v2-matrix.md lists the scenarios, and this test compares the names.
The scenarios called `control` take a part of the engine out and see the text change.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from specplus_kernels import dispatch

from tests.engine.apart import RESULT

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation")

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "schedule": "v2",
    "experts": "v2_drafters",
    "drafter": "v2_drafters",
    "settings": "v2_settings",
    "processes": "v2_processes",
    "width": "v2_width",
    "feature": "v2",
    "gpu": "v2_gpu",
    "triton": "v2",
    "control": "v2",
}
"""Each group's module, the longest first."""
MATRIX = (ROOT / "docs/v2-matrix.md").read_text()


def run_group(group: str) -> dict[str, str]:
    """How each scenario of the group ended."""
    command = [sys.executable, "-m", f"tests.engine.{GROUPS[group]}", group]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not lines:
        return {group: done.stdout[-2000:] + done.stderr[-4000:]}
    return json.loads(lines[-1].removeprefix(RESULT))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str]]:
    """Of all groups; two run at a time, each on one core."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(GROUPS, pool.map(run_group, GROUPS), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
def test_scenarios(group: str, outcomes: dict[str, dict[str, str]]) -> None:
    failed = {name: said for name, said in outcomes[group].items() if said != "ok"}
    assert not failed, "\n\n".join(f"{name}\n{said}" for name, said in failed.items())
    assert set(outcomes[group]) == set(re.findall(rf"`({group}: [^`]+)`", MATRIX))
