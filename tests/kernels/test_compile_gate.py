"""Served kernels compile for sm_80, sm_90 and sm_100 without spills; which, compile_gate.py says.

Seen to fail: a kernel that keeps 64 KB per warp in registers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specplus_kernels import dispatch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation"),
]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: kernels that were imported for the interpreter do not compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.timeout(900)
def test_served_kernels_do_not_spill(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_python("-m", "tests.kernels.compile_gate", "--quick")
    with capsys.disabled():
        print(f"\n{result.stdout}{result.stderr}")
    assert result.returncode == 0
    assert all(f" {capability} " in result.stdout for capability in (80, 90, 100))


SPILLING = """
import torch, triton, triton.language as tl
from tests.kernels.compile_gate import problems
from tests.kernels.offline import compiling

@triton.jit
def _k(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x / tl.sum(x))

with compiling(90) as kernels:
    _k[(1,)](torch.empty(1 << 14), N=1 << 14, num_warps=1)
print(problems(kernels[0]))
"""


def test_a_spill_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"  # Triton reads a kernel's source from its file
    script.write_text(SPILLING)
    result = run_python("-c", f"import runpy; runpy.run_path({str(script)!r})")
    assert "spills" in result.stdout, result.stderr


def test_launches_run_in_a_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU")
    from tests.kernels.compile_gate import OPS, import_module

    for op in OPS:
        for _, launch in import_module(f"tests.kernels.served.{op}").LAUNCHES:
            with torch.device("cuda"):
                launch()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    launch()
                graph.replay()
                torch.cuda.synchronize()
