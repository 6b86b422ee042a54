"""The end-to-end benchmark itself, on a tiny model: plain vLLM and vLLM's own n-gram drafter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.e2e import measure
from benchmarks.e2e.generate import main
from benchmarks.provenance import ROOT
from tests.engine.models import BUILDERS, save

pytestmark = pytest.mark.slow

MAX_MODEL_LEN = 128
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama, which in fp32 has greedy texts that are equal token for token."""
    path = tmp_path_factory.mktemp("llama")
    save(BUILDERS["llama"](), path)
    return path


def engines_of(pid: int) -> set[str]:
    """Process ids of the engines that a process has started."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {child for path in tasks for child in path.read_text().split() if is_engine(child)}


def is_engine(pid: str) -> bool:
    """Whether the process runs, and is an engine's."""
    try:
        return b"benchmarks.e2e.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def test_generate_measures_and_compares(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-9)  # every step is a turn
    out = tmp_path / "out.json"
    limits = [
        "--enforce-eager",
        "--dtype",
        "float32",
        "--max-tokens",
        str(MAX_TOKENS),
        "--max-model-len",
        str(MAX_MODEL_LEN),
    ]
    sizes = ["--limit", "4", "--batch-sizes", "1", "2", "--per-place", "2", "--kv-cache-mib", "64"]
    methods = ["--methods", "plain", "native-ngram:K=3:max=2:min=1", "[ngram]:K=3:tree=dynamic:4"]
    code = main(["--model", str(model), *limits, *sizes, *methods, "--json", str(out)])
    data = json.loads(out.read_text())
    assert code == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [(r["batch_size"], r["num_rounds"]) for r in data["rows"]] == [
        *[(1, 2)] * 3,
        *[(2, 1)] * 3,
    ]
    for row in data["rows"]:
        assert row["num_tokens"] == 2 * row["num_rounds"] * row["batch_size"] * MAX_TOKENS
    assert {run["steps"] for run in data["rounds"] if run["method"] == "plain"} == {2 * MAX_TOKENS}
    plain, ngram, ours = data["rows"][:3]
    assert (plain["acceptance_length"], plain["drafts"]) == (1, 0)
    assert 0 < ngram["accepted"] < ngram["drafted"] <= 3 * ngram["drafts"]
    assert ngram["acceptance_length"] > 1 and len(ngram["acceptance_per_depth"]) <= 3
    assert ngram["accepted"] == round(sum(ngram["acceptance_per_depth"]) * ngram["drafts"])
    assert plain["draft_ms"] is ngram["draft_ms"] is None and 0 < ours["draft_ms"] < ours["step_ms"]
    assert 0 < ours["nodes"] <= 4
    assert [e["num_equal"] for e in data["equality"]] == [4] * 5


def test_an_engine_that_cannot_start_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tmp_path / "missing"), "--limit", "1"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"engine (plain|native-ngram): .*missing", output), output
    assert not engines_of(os.getpid())


def test_a_mistake_in_the_options_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "M", "--limit", "4", "--batch-sizes", "8"]) == 2
    assert "batch size 8 must take from 1 to 4 prompts" in capsys.readouterr().out


def test_ctrl_c_leaves_no_process(model: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.e2e.generate", "--model", str(model)]
    command += ["--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN), "--max-tokens", "24"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    engines: set[str] = set()
    deadline = time.monotonic() + 240
    while len(engines) < 2 and time.monotonic() < deadline:
        engines = engines_of(run.pid)
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=240)
    assert (len(engines), run.returncode) == (2, 130), output
    assert not any(map(is_engine, engines))
