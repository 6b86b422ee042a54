"""Each part of tests/engine/interpreter.py is needed, and vLLM's kernels are right with them.

The cases run twice, in a process with these parts and in one with the interpreter alone. Seen to
fail: the stand-in, the masks' cast and `HAS_TRITON = False` each left out; the stand-in left in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from specplus_kernels import dispatch

from tests.engine.apart import RESULT

pytestmark = [
    pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton in this installation"),
    pytest.mark.slow,
]
ROOT = Path(__file__).resolve().parents[2]
STARTS = {
    "with": "import tests.engine.interpreter",
    "without": "import os; os.environ['TRITON_INTERPRET'] = '1'; import tests.conftest",
}


def has_triton() -> bool:
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON


def stand_in_is_gone() -> bool:
    """Inductor would take it for a driver."""
    import triton.backends
    import vllm.triton_utils  # noqa: F401

    return "cpu" not in triton.backends.backends


def reduced_mask() -> list[int]:
    """As in vLLM's `_ngram_finalize_kernel`."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy_first(source, target, num, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        mask = (at < num) & (tl.max(at, axis=0) > 0)
        tl.store(target + at, tl.load(source + at, mask=mask, other=9), mask=mask)

    target = torch.zeros(4, dtype=torch.int32)
    copy_first[(1,)](torch.arange(5, 9, dtype=torch.int32), target, 2, BLOCK=4)
    return target.tolist()


def top_k() -> list[float]:
    """vLLM's choice of a way to do it, which is not its kernel."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    kept = apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.99]))
    return kept.clamp(min=-1)[0].tolist()


def top_k_kernel() -> list[float]:
    from vllm.v1.sample.ops import topk_topp_sampler

    with mock.patch.object(topk_topp_sampler, "HAS_TRITON", True):
        return top_k()


def resampled() -> list[list[int]]:
    """vLLM's kernels for sampled drafts of which the first is impossible."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils import rejection_sample

    ids = torch.tensor([0, 0], dtype=torch.int32)
    sampled, _ = rejection_sample(
        target_logits=torch.tensor([[9.0, -9.0], [9.0, -9.0]]),
        draft_logits=torch.zeros(1, 1, 2),
        draft_sampled=torch.tensor([0, 1], dtype=torch.int32),
        cu_num_logits=torch.tensor([0, 2], dtype=torch.int32),
        pos=torch.tensor([3, 4]),
        idx_mapping=ids[:1],
        expanded_idx_mapping=ids,
        expanded_local_pos=torch.tensor([0, 1], dtype=torch.int32),
        temperature=torch.ones(1),
        seed=torch.tensor([7]),
        num_speculative_steps=1,
    )
    return sampled.tolist()


def post_update() -> list[Any]:
    """Two requests in slots 2 and 0: two tokens after a rejected draft, and one token."""
    from vllm.v1.worker.gpu.input_batch import post_update

    computed, total_len = torch.tensor([[4, 0, 9], [5, 0, 10]], dtype=torch.int32)
    last, token_ids = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 16, dtype=torch.int32)
    int32 = [torch.tensor(x, dtype=torch.int32) for x in ([2, 0], [2, 1], [1, 0], [0, 3, 4])]
    slots, num_sampled, num_rejected, query_start_loc = int32
    post_update(
        slots,
        computed,
        last,
        None,
        torch.tensor([[7, 8], [6, 0]]),
        num_sampled,
        num_rejected,
        query_start_loc,
        token_ids,
        total_len,
    )
    written = {int(at): int(token_ids.flatten()[at]) for at in token_ids.flatten().nonzero()}
    return [computed.tolist(), total_len.tolist(), last.flatten().tolist(), written]


def slot_mappings() -> list[list[int]]:
    """Of two groups with blocks of 4 and 2 tokens; the fourth row is padding."""
    import vllm.v1.worker.cpu.shm  # noqa: F401  (vLLM's own changes to the runner for CPUs)
    from vllm.v1.worker.gpu.block_table import BlockTables

    tables = BlockTables([4, 2], 2, 4, [3, 6], torch.device("cpu"))
    tables.append_block_ids(1, ([5, 6], [8, 9, 7]), overwrite=True)
    tables.apply_staged_writes()
    slots = tables.compute_slot_mappings(
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0, 3, 5]),
        4,
    )
    return slots.tolist()


OK: dict[str, tuple[Callable[[], Any], Any]] = {
    "vLLM finds Triton": (has_triton, True),
    "the stand-in is gone": (stand_in_is_gone, True),
    "masks of a reduction": (reduced_mask, [5, 6, 0, 0]),
    "top-k without the kernel": (top_k, [-1, 4, -1, 3]),
    "post_update": (post_update, [[5, 0, 11], [6, 0, 12], [6, 0, 8], {"5": 6, "42": 7, "43": 8}]),
    "compute_slot_mappings": (slot_mappings, [[20, 23, 25, -1], [16, 19, 15, -1]]),
}
"""Cases of the interpreter's parts and what comes out."""
CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "top-k kernel": (top_k_kernel, "'int' object has no attribute 'to'"),
    "kernels for sampled drafts": (resampled, "'NoneType' object has no attribute 'dtype'"),
}
"""What the interpreter cannot run; docs/v2-matrix.md says so."""
WITHOUT: dict[str, Any] = {
    "vLLM finds Triton": False,
    "the stand-in is gone": True,
    "top-k without the kernel": [-1, 4, -1, 3],
}
"""What comes out without them; the others raise."""


def tried(case: Callable[[], Any]) -> Any:
    try:
        return case()
    except Exception as error:
        return f"raised {error}"


def main() -> None:
    found = {name: tried(case) for name, (case, _) in (OK | CANNOT).items()}
    print("\n" + RESULT + json.dumps(found), flush=True)


@pytest.fixture(scope="module", params=STARTS)
def found(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    code = f"{STARTS[request.param]}; from tests.engine.test_interpreter import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert lines, done.stderr[-4000:]
    return request.param, json.loads(lines[-1].removeprefix(RESULT))


@pytest.mark.parametrize("name", OK)
def test_parts(name: str, found: tuple[str, dict[str, Any]]) -> None:
    parts, outcomes = found
    if parts == "with":
        assert outcomes[name] == OK[name][1]
    elif name in WITHOUT:
        assert outcomes[name] == WITHOUT[name]
    else:
        assert str(outcomes[name]).startswith("raised")


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_run_cannot(name: str, found: tuple[str, dict[str, Any]]) -> None:
    """When one can, a part or a line of docs/v2-matrix.md is no longer needed."""
    parts, outcomes = found
    assert parts == "without" or CANNOT[name][1] in outcomes[name]
