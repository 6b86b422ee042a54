"""`vllm-specplus check`: what it finds and how it exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.engine.configs import LLAMA, write_config
from vllm_specplus.cli import main
from vllm_specplus.startup import host
from vllm_specplus.startup.patches import PATCHES


def check(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(main, ["check", "--json", *arguments])
    return result.exit_code, json.loads(result.stdout)


def test_all_is_well_here() -> None:
    exit_code, found = check()
    assert (exit_code, found["ok"], found["engine"]["name"]) == (0, True, "cpu-v1")
    assert found["versions"]["vllm"] == host.vllm_version()
    assert found["versions"]["torch"] and found["machine"]["cores"] >= 1
    assert isinstance(found["machine"]["compiled_kernels"], bool)
    names = {hook["name"] for hook in found["hooks"]}
    assert {str(patch) for patch in PATCHES} | set(host.HOST_METHODS) < names
    assert "vllm.v1.worker.cpu_model_runner.CPUModelRunner" in names
    others = {hook["name"]: hook["missing"] for hook in found["hooks of the other engine"]}
    assert set(host.V2_HOST_METHODS) - names <= set(others) and not any(others.values())


def test_a_missing_hook_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.HOST_METHODS, "CPUModelRunner._gone", "")
    exit_code, found = check()
    assert (exit_code, found["ok"], found["engine"]["name"]) == (1, False, None)
    assert "CPUModelRunner._gone was not found" in found["engine"]["why"]
    (missing,) = [hook for hook in found["hooks"] if hook["missing"]]
    assert missing["name"] == "CPUModelRunner._gone"


@pytest.mark.parametrize(
    ("config", "exit_code", "said"),
    [
        (LLAMA, 0, []),
        (LLAMA | {"attention_chunk_size": 64}, 1, ["it has chunked local attention"]),
        ({}, 1, ["cannot be read by vLLM"]),
    ],
)
def test_model(tmp_path: Path, config: dict[str, Any], exit_code: int, said: list[str]) -> None:
    found_code, found = check("--model", write_config(tmp_path, config))
    refused = found["model"]["refused"]
    assert found_code == exit_code and len(refused) == len(said)
    assert all(part in sentence for part, sentence in zip(said, refused, strict=True))


def test_tables(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", LLAMA)
    result = CliRunner().invoke(main, ["check", "--model", model], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for part in ("cpu-v1", model, "nothing", "EngineArgs.from_cli_args", "Token trees can run"):
        assert part in result.stdout
    assert "check" in CliRunner().invoke(main, ["--help"]).stdout
