"""Engines whose core and workers are processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.engine.apart import RESULT
from tests.engine.engines import DEFAULTS, model_path, reference, spec_options
from tests.engine.features import facts, mixed, requests
from tests.engine.heads import random_path
from tests.engine.metrics import LOGGED, check
from tests.engine.streaming import assert_streamed

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "default_executor": {},
    "two_tensor_parallel_workers": dict(tensor_parallel_size=2, distributed_executor_backend="mp"),
}


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **changes}


def run_apart(job: dict) -> dict:
    """The result of apart.py; asserts that no process of its session is left, and that one line
    about the rounds was logged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(VLLM_LOGGING_LEVEL="INFO"),
        start_new_session=True,
    )
    out, err = process.communicate(json.dumps(job), timeout=300)
    assert process.returncode == 0, err[-4000:]
    assert not left_of_session(process.pid)
    assert (out + err).count(LOGGED) == 1
    (result,) = (line for line in out.splitlines() if line.startswith(RESULT))
    return json.loads(result.removeprefix(RESULT))


def left_of_session(session: int) -> list[psutil.Process]:
    """Live processes of a session, after a moment for the last ones to end."""
    members = [p for p in psutil.process_iter() if _session(p.pid) == session]
    _, alive = psutil.wait_procs(members, timeout=60)
    return alive


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    [("llama", "default_executor"), ("sliding", "two_tensor_parallel_workers")],
)
def test_all_features_in_one_batch(model, layout):
    asked = mixed()
    plain = reference(model, asked)
    job = dict(
        path=str(model_path(model)),
        method="oracle",
        options=LAYOUTS[layout] | dict(disable_log_stats=False),
        truth=[
            (request.prompt, list(sequence.token_ids))
            for request, output in zip(asked, plain, strict=True)
            for sequence in output.outputs
        ],
    )
    result = run_apart(job)
    assert result["facts"] == json.loads(json.dumps([facts(output) for output in plain]))
    assert len(result["workers"]) == LAYOUTS[layout].get("tensor_parallel_size", 1)
    assert all(w["accepted"] > 0 and w["moved"] > 0 for w in result["workers"])
    stats = check(result["counted"], aborts=True)
    assert stats.num_accepted_tokens == result["workers"][0]["accepted"]
    assert stats.fallbacks["structured_outputs"] == sum(
        request.params.structured_outputs is not None for request in asked
    )


@pytest.mark.slow
def test_mtp_heads_of_two_workers():
    asked = mixed()
    plain = reference("llama", asked)
    heads = dict(speculative_model=f"[mtp3+ngram]{random_path()}", num_speculative_tokens=3)
    options = LAYOUTS["two_tensor_parallel_workers"] | heads | dict(disable_log_stats=False)
    job = dict(path=str(model_path("llama")), method="dynamic", options=options, truth=[])
    result = run_apart(job)
    assert result["facts"] == json.loads(json.dumps([facts(output) for output in plain]))
    assert all(w["accepted"] > 0 for w in result["workers"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_async_engine_streams_and_aborts(method):
    asked = requests("greedy", 6)
    assert_streamed(asked, reference("llama", asked), **DEFAULTS | spec_options(method))
