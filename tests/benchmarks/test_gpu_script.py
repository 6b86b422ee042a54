"""benchmarks/gpu/run.sh on a machine without a GPU: what cannot run is named, what can does run.

Sabotages that were caught: a failed part that is not counted, vLLM not looked for, the oldest PTX
kept, a sampled text that may differ, drafts that are never accepted.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.e2e.methods import parse_methods
from benchmarks.gpu import equality, pack
from benchmarks.provenance import ROOT

RUN = ROOT / "benchmarks/gpu/run.sh"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does all of it")


def run(tmp_path: Path, *arguments: str, **env: Any) -> tuple[int, str, str]:
    """Exit status, output, and the summary that the run wrote."""
    known = {"OUT": tmp_path / "out", "WHEELS": tmp_path / "wheels", "PYTHON": sys.executable}
    strings = {name: str(value) for name, value in (known | env).items()}
    done = subprocess.run(
        [str(RUN), *arguments],
        env=os.environ | strings,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    summary = tmp_path / "out/summary.txt"
    return done.returncode, done.stdout, summary.read_text() if summary.exists() else ""


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """This interpreter without its packages, so without vLLM too."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    status, output, _ = run(tmp_path, "--only", "kernels")
    assert status == 2
    assert "no part 'kernels'; the parts are site kernel-tests" in output


def test_what_is_missing_is_named_and_the_next_part_runs(tmp_path: Path, bare_python: Path) -> None:
    status, output, summary = run(tmp_path, "--only", "site", "equality", PYTHON=bare_python)
    assert status == 1
    assert f"no {tmp_path}/wheels/site.tar.xz" in output
    assert output.count("cannot import vllm (ModuleNotFoundError") == 2
    assert "site: FAILED" in summary and "equality: FAILED" in summary


@pytest.mark.slow
@without_gpu
def test_kernel_parts_run_and_a_failure_is_recorded(tmp_path: Path) -> None:
    """The first part passes here; the second says that there is no GPU."""
    status, output, summary = run(
        tmp_path,
        "--only",
        "kernel-tests",
        "kernel-benchmarks",
        PYTEST_ADDOPTS="-k test_dispatch -p no:cacheprovider",
    )
    assert status == 1
    assert "kernel-tests: ok" in summary and "kernel-benchmarks: FAILED" in summary
    assert "No GPU" in output
    assert "device: " in summary and "'torch': " in summary


@pytest.mark.slow
def test_carried_packages_are_unpacked(tmp_path: Path) -> None:
    """As `pack` writes them."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "carried.py").write_text("ANSWER = 42\n")
    with tarfile.open(tmp_path / "wheels/site.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "carried.py", "./carried.py")
    site = tmp_path / "site"
    status, output, _ = run(tmp_path, "--only", "site", SITE=site)
    assert status == 0, output
    assert "ANSWER = 42" in (site / "carried.py").read_text()


CUBIN, PTX = 2, 1


def fat_binary(*elements: tuple[int, int, bytes]) -> bytes:
    """A CUDA fat binary's container of (kind, architecture, code)."""
    packed = b"".join(
        struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), made_for) + code
        for kind, made_for, code in elements
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(packed)) + packed


def test_code_for_one_gpu_stays() -> None:
    """Its machine code, else its newest PTX, where the container was; nothing after it moves."""
    others = (CUBIN, 80, b"sm_80 code"), (CUBIN, 100, b"sm_100 code"), (PTX, 75, b"// ptx")
    own, newest, too_new = (CUBIN, 90, b"own"), (PTX, 80, b"// newest"), (PTX, 100, b"// new")
    unfit = fat_binary(too_new, (CUBIN, 80, b"sm_80 code"))
    before = fat_binary(*others, own, newest), fat_binary(newest, *others, too_new), unfit
    smaller = fat_binary(own), fat_binary(newest), unfit
    after = tuple(new.ljust(len(old), b"\0") for old, new in zip(before, smaller, strict=True))
    around = b"\x7fELF%sbetween%s%send"
    assert pack.for_one_gpu(around % before, 90) == around % after


def test_the_stripped_wheel_keeps_what_is_imported() -> None:
    kept = [
        "vllm/v1/worker/gpu/model_runner.py",
        "vllm/_C_stable_libtorch.abi3.so",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
        "vllm/model_executor/layers/fused_moe/configs/E=1,N=1.json",
        "vllm-0.33.0.dist-info/RECORD",
    ]
    left = ["vllm/vllm-rs", "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so", "vllm/third_party/a.hpp"]
    assert [member for member in kept + left if pack.is_kept(member)] == kept


def test_the_methods_of_the_matrix_are_known() -> None:
    assert len(parse_methods([*equality.OURS.values(), *equality.NATIVE.values()])) == 6


@pytest.mark.slow
@without_gpu
def test_one_cell_of_the_matrix_holds_here(tmp_path: Path) -> None:
    """Sampled, where our trees must give plain's text; vLLM takes its CPU engine."""
    status, output, summary = run(
        tmp_path,
        "--only",
        "equality",
        "--tiny",
        EQUALITY="--temperatures 0.1 --ours static heads",
        OMP_NUM_THREADS=1,
        VLLM_CACHE_ROOT=tmp_path / "cache",  # nothing is known yet of any class of models
    )
    assert (status, "equality: ok" in summary) == (0, True), output[-3000:]
    [cell] = json.loads((tmp_path / "out/equality.json").read_text())["cells"]
    assert cell["problems"] == []
    for name in ("static", "heads"):
        assert cell["equal"][f"{equality.OURS[name]} at batch 1"] == "2 of 2"
        assert cell["accepted"][f"{equality.OURS[name]} at batch 1"] > 0


@pytest.mark.parametrize(
    ("dtype", "temperature", "accepted", "unexplained", "divergences", "said"),
    [
        ("float32", 0.0, 5, 0, 0, []),
        ("bfloat16", 0.0, 5, 0, 2, []),
        ("bfloat16", 0.0, 5, 1, 2, ["2 of 4 texts differ, 1 unexplained"]),
        ("float32", 0.2, 5, 0, 1, ["1 of 4 texts differ"]),
        ("bfloat16", 0.2, 5, 0, 1, []),
        ("float32", 0.0, 0, 0, 0, ["no draft was accepted"]),
    ],
)
def test_what_makes_a_cell_fail(
    dtype: str,
    temperature: float,
    accepted: int,
    unexplained: int,
    divergences: int,
    said: list[str],
) -> None:
    method = dict(method=equality.OURS["dynamic"], batch_size=1)
    compared = dict(compared=4, num_unexplained=unexplained, divergences=[None] * divergences)
    result: Any = SimpleNamespace(
        rows=[SimpleNamespace(**method, accepted=accepted)],
        equalities=[SimpleNamespace(**method, **compared)],
    )
    found = list(equality.problems(equality.Cell("llama", dtype, "off", temperature), result))
    assert len(found) == len(said)
    assert all(words in problem for words, problem in zip(said, found, strict=True))
