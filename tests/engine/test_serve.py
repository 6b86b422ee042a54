"""`vllm serve` with our flags and the openai client."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.engine.engines import model_path, reference
from tests.engine.features import requests
from tests.engine.metrics import LOGGED
from tests.engine.test_processes import ROOT, environment, left_of_session

START_TIMEOUT = 120.0
NUM_ABORTED = 4
MOST_PER_STEP = {"num_drafts": 1, "num_draft_tokens": 12, "num_accepted_tokens": 5}
"""What a step may add for one request; vLLM does not count the step that an abort runs into."""
FLAGS = (
    "--speculative-model [ngram] --num-speculative-tokens 5 --speculative-tree dynamic:12 "
    "--dtype float32 --enforce-eager --max-model-len 512 --block-size 32 "
    "--num-gpu-blocks-override 512 --served-model-name tiny"
).split()


@contextmanager
def server(log: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """A serving process in a session of its own, which writes to `log`, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path("llama"))]
    process = subprocess.Popen(
        [*vllm, *FLAGS, "--port", str(port)],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment(VLLM_LOGGING_LEVEL="INFO"),
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(url + "/health"), START_TIMEOUT)
        assert process.poll() is None, log.read_text()[-4000:]
        yield process, url
    finally:
        for member in left_of_session(process.pid) if process.poll() is not None else [process]:
            member.kill()


def wait_until(condition, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


def metric(url: str, name: str, label: str = "") -> float:
    """Sum of a metric's samples."""
    text = urllib.request.urlopen(url + "/metrics", timeout=5).read().decode()
    sample = rf"^{name}(?:{{.*{label}.*}})? (\S+)$"
    return sum(float(v) for v in re.findall(sample, text, re.MULTILINE))


async def ask(client: openai.AsyncOpenAI, index: int, prompt: Sequence[int]) -> str:
    """The completion: whole for even requests, streamed for odd ones, dropped for every fourth."""
    options: Any = dict(model="tiny", prompt=prompt, max_tokens=40, temperature=0)
    if index % 2 == 0:
        return (await client.completions.create(**options)).choices[0].text
    text = ""
    stream = await client.completions.create(stream=True, **options)
    async for chunk in stream:
        text += chunk.choices[0].text
        if index % 4 == 3 and text:
            await stream.close()
            break
    return text


async def ask_all(url: str, prompts: Sequence[Sequence[int]]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
        return await asyncio.gather(*(ask(client, i, p) for i, p in enumerate(prompts)))


def assert_counters(url: str) -> str:
    """Ours on `/metrics` are vLLM's, where it has them; what the log must say of them."""
    for name in MOST_PER_STEP:
        ours, theirs = f"vllm_specplus:{name}_total", f"vllm:spec_decode_{name}_total"
        missed = metric(url, ours) - metric(url, theirs)  # the last step of each aborted request
        assert 0 <= missed <= NUM_ABORTED * MOST_PER_STEP[name] < metric(url, ours)
    per_pos = "vllm_specplus:num_accepted_tokens_per_pos_total"
    assert metric(url, per_pos) == metric(url, "vllm_specplus:num_accepted_tokens_total")
    assert metric(url, per_pos, 'position="0"') >= metric(url, per_pos, 'position="1"') > 0
    assert metric(url, "vllm_specplus:draft_seconds_total") > 0
    assert metric(url, "vllm_specplus:verify_seconds_total", 'engine="0",model_name="tiny"') > 0
    assert metric(url, "vllm_specplus:fallbacks_total", 'reason="structured_outputs"') == 0
    drafts = metric(url, "vllm_specplus:num_drafts_total")
    return f"{metric(url, 'vllm_specplus:num_rounds_total'):.0f} rounds, {drafts:.0f} with drafts"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_counts_frees_and_stops(stop, tmp_path):
    asked = requests("greedy", 16)
    plain = [output.outputs[0].text for output in reference("llama", asked)]
    log = tmp_path / "log"
    with server(log) as (process, url):
        texts = asyncio.run(ask_all(url, [request.prompt for request in asked]))
        for index, (text, whole) in enumerate(zip(texts, plain, strict=True)):
            assert whole.startswith(text) and text if index % 4 == 3 else text == whole
        wait_until(lambda: metric(url, "vllm:num_requests_running") == 0, 10)
        assert metric(url, "vllm:kv_cache_usage_perc") == 0
        counted = assert_counters(url)
        process.send_signal(stop)
        assert process.wait(30) in (0, -stop, 128 + stop)
        assert not left_of_session(process.pid)
    assert log.read_text().count(LOGGED) == 1 and LOGGED + counted in log.read_text()
