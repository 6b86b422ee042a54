"""The whole command on a tiny model: vLLM writes the text, heads are trained, measured and served
from the folder.

Sabotages that were caught: text written anew on the second call, held-out prompts trained on,
greedy text in place of the mix, text in the model's bfloat16 for `--fp32`, the draft vocabulary's
least frequent tokens, Ctrl-C not heard or its handler left behind, a SIGTERM that nobody handles.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner, Result

from tests.engine.models import BUILDERS, WORDS, save
from tests.train.tiny import load_teacher, write_samples
from vllm_specplus.cli import main
from vllm_specplus.proposers.heads.checkpoint import load_heads
from vllm_specplus.proposers.heads.eagle_checkpoint import load_eagle
from vllm_specplus.proposers.heads.files import check_fits
from vllm_specplus.proposers.heads.medusa_checkpoint import load_medusa
from vllm_specplus.train import command
from vllm_specplus.train.target import Writer
from vllm_specplus.train.text import TextFile
from vllm_specplus.train.trainer import HeadsTrainer

NUM_PROMPTS, TEXT_TOKENS = 12, 2500


def arguments(folder: Path, *options: str, out: str = "out", kind: str = "mtp3") -> list[str]:
    given = ["--model", folder / "model", "--prompts", folder / "p.jsonl", "--out", folder / out]
    sizes = "--prompt-tokens 12 --new-tokens 20 --draft-vocab 200 --head-rows 100 --fp32".split()
    return ["train", kind, *map(str, given), *sizes, "--text-tokens", str(TEXT_TOKENS), *options]


def train(folder: Path, *options: str, **where: str) -> Result:
    return CliRunner().invoke(main, arguments(folder, *options, **where), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    save(BUILDERS["llama"]().bfloat16(), folder / "model")
    rows = [
        {"prompt": " ".join(WORDS[i : i + 9]), "kind": "even" if i % 2 else "odd"}
        for i in range(NUM_PROMPTS)
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
def test_one_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote_in = []

    class Watched(Writer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            wrote_in.append(self.llm.llm_engine.model_config.dtype)

    monkeypatch.setattr(command, "Writer", Watched)
    result = train(folder, "--tokens", "4000", "--int8")
    assert wrote_in == [torch.float32]
    assert result.exit_code == 0, result.output
    out = folder / "out"
    assert f'--speculative-model "[mtp3]{out}" --num-speculative-tokens 3' in result.output
    heads = load_heads(out)
    check_fits(heads, hidden_size=64, vocab_size=448)
    assert heads.config.draft_vocab_size == 200 and heads.config.target == str(folder / "model")
    assert heads.config.training["token_passes"] >= 4000
    report = json.loads((out / "report.json").read_text())
    assert report["acceptance"]["all"]["rounds"] == 17  # a root, then 3 drafts, in 20 tokens
    assert 0.05 < report["acceptance"]["all"]["top"]["1"][0] <= 1
    assert "| all |" in (out / "report.md").read_text()
    assert (out / "report.png").stat().st_size > 10_000

    samples = TextFile(out / "text.jsonl", str(folder / "model")).samples
    measured = [s for s in samples if s.held_out]
    trained = [s for s in samples if not s.held_out]
    assert len(measured) == 1 and sum(len(s.token_ids) for s in trained) >= TEXT_TOKENS
    prompts = {tuple(s.token_ids[: s.prompt_len]) for s in trained}
    assert tuple(measured[0].token_ids[: measured[0].prompt_len]) not in prompts
    assert len(prompts) == NUM_PROMPTS - 1 < len({tuple(s.token_ids) for s in trained})

    counts = dict.fromkeys(range(448), 0)
    for sample in trained:
        for token in sample.token_ids[sample.prompt_len :]:
            counts[token] += 1
    assert heads.draft_vocab is not None
    kept = [counts[token] for token in heads.draft_vocab.tolist()]
    assert kept == sorted(counts.values(), reverse=True)[:200]


@pytest.mark.slow
def test_a_second_call_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a higher limit it trains on, over the same text: vLLM is not asked again."""
    train(folder, "--tokens", "4000", "--int8")
    before = load_heads(folder / "out").config.training
    written = (folder / "out/text.jsonl").read_bytes()
    monkeypatch.setattr(command, "Writer", None)
    result = train(folder, "--tokens", "6000", "--int8")
    assert result.exit_code == 0, result.output
    after = load_heads(folder / "out").config.training
    assert before["token_passes"] < 6000 <= after["token_passes"]
    assert after["steps"] > before["steps"] > 0
    assert (folder / "out/text.jsonl").read_bytes() == written
    refused = train(folder, "--tokens", "6000", "--seed", "3")
    assert refused.exit_code == 2
    assert "Error: out=" in refused.output and "was trained with seed 0" in refused.output


@pytest.mark.slow
def test_sigterm_ends_the_engine_too(folder: Path) -> None:
    """In the midst of the text. No terminal sends it to the engine's processes."""
    command = [sys.executable, "-c", "from vllm_specplus.cli import main; main()"]
    command += arguments(folder, "--text-tokens", "1000000000", out="ended")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    run = psutil.Popen(command, env=environment)
    started = []
    try:
        text, deadline = folder / "ended/text.jsonl", time.monotonic() + 240
        while not text.exists() or len(text.read_text().splitlines()) < 100:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        started = run.children(recursive=True)
        run.terminate()
        assert run.wait(60) == 130
        _, left = psutil.wait_procs(started, timeout=60)
        assert started and not left
    finally:
        for each in [run, *started]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def test_ctrl_c_keeps_the_state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over text that is there already, without vLLM: two steps, Ctrl-C in the second, and on."""
    (folder / "stopped").mkdir()
    samples = write_samples(load_teacher(folder / "model"), 80, 32)
    samples[0] = samples[0].model_copy(update={"held_out": True})
    TextFile(folder / "stopped/text.jsonl", str(folder / "model")).add(samples)
    monkeypatch.setattr(command, "Writer", None)
    step = HeadsTrainer._step

    def step_and_interrupt(trainer: HeadsTrainer) -> None:
        step(trainer)
        if trainer.progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(HeadsTrainer, "_step", step_and_interrupt)
    stopped = train(folder, "--tokens", "1000", out="stopped")
    assert stopped.exit_code == 130, stopped.output
    assert "Stopped; the same command goes on" in stopped.output
    assert not (folder / "stopped/config.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(folder, "--tokens", "1000", out="stopped").exit_code == 0
    assert load_heads(folder / "stopped").config.training["steps"] == 4  # of 8 x 32 tokens


def test_medusa(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same stages over text that is there, and on from the heads of the first call."""
    samples = write_samples(load_teacher(folder / "model"), 20, 32)
    samples[0] = samples[0].model_copy(update={"held_out": True})
    for name in ("medusa", "further"):
        (folder / name).mkdir()
        TextFile(folder / name / "text.jsonl", str(folder / "model")).add(samples)
    monkeypatch.setattr(command, "Writer", None)
    sizes = ("--text-tokens", "300", "--tokens", "600")
    result = train(folder, *sizes, "--heads", "2", "--layers", "2", out="medusa", kind="medusa")
    assert result.exit_code == 0, result.output
    out = folder / "medusa"
    assert f'--speculative-model "[medusa]{out}" --num-speculative-tokens 2' in result.output
    heads = load_medusa(out)
    check_fits(heads, hidden_size=64, vocab_size=448)
    assert (heads.config.num_heads, heads.config.num_layers) == (2, 2)
    assert heads.config.draft_vocab_size == 200 and heads.num_lm_heads == 0
    assert heads.config.training["trainer"].endswith("train medusa")
    result = train(folder, *sizes, "--start", str(out), out="further", kind="medusa")
    assert result.exit_code == 0, result.output
    further = load_medusa(folder / "further")
    assert further.config.training["started_from"] == str(out)
    assert further.config.num_heads == 2
    moved = [further.tensors[name] - tensor for name, tensor in heads.tensors.items()]
    assert all(0 < float(step.abs().max()) < 0.05 for step in moved)


def test_eagle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, with a loss over a part of the tokens and a measurement over all of them."""
    samples = write_samples(load_teacher(folder / "model"), 20, 32)
    samples[0] = samples[0].model_copy(update={"held_out": True})
    for name in ("eagle", "eagle further"):
        (folder / name).mkdir()
        TextFile(folder / name / "text.jsonl", str(folder / "model")).add(samples)
    monkeypatch.setattr(command, "Writer", None)
    sizes = ("--text-tokens", "300", "--tokens", "600", "--draft-vocab", "3")
    result = train(folder, *sizes, "--depths", "2", out="eagle", kind="eagle")
    assert result.exit_code == 0, result.output
    out = folder / "eagle"
    assert f'--speculative-model "[eagle]{out}" --num-speculative-tokens 2' in result.output
    head = load_eagle(out)
    check_fits(head, hidden_size=64, vocab_size=448)
    assert head.config.training["trainer"].endswith("train eagle")
    report = json.loads((out / "report.json").read_text())
    first_look, whole = report["progress"]["evaluations"][0][1][0], report["acceptance"]["all"]
    # Three tokens are hardly ever right, all can be.
    assert max(first_look) < 0.1 < min(whole["top"]["1"])
    result = train(folder, *sizes, "--start", str(out), out="eagle further", kind="eagle")
    assert result.exit_code == 0, result.output
    further = load_eagle(folder / "eagle further")
    assert further.config.training["started_from"] == str(out)
    refused = train(folder, *sizes, "--depths", "3", out="eagle", kind="eagle")
    assert "was trained with depths 2, but this run has 3" in refused.output


def test_errors_are_one_line(folder: Path) -> None:
    result = train(folder, "--start", str(folder / "nothing"))
    assert result.exit_code == 2
    assert result.output.startswith("Error: heads=") and result.output.count("\n") == 1
    assert not (folder / "nothing").exists()
    result = train(folder, "--model", str(folder / "no model"))
    assert result.exit_code == 2
    assert result.output.startswith("Error: model=") and result.output.count("\n") == 1
