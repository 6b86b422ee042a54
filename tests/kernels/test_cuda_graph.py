"""A captured launch, replayed on other inputs, does what an eager launch does.

Where there is no GPU the replay is a second call, which keeps the cases themselves tested. Seen to
fail for every op: inputs that do not change before the replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specplus_kernels.kv_commit import KVCommitPlan
from specplus_kernels.ngram_match import ngram_match
from specplus_kernels.rejection import rejection
from specplus_kernels.row_commit import row_commit
from specplus_kernels.tree_attention import tree_attention
from specplus_kernels.tree_grow import rerank
from specplus_kernels.tree_rejection import tree_rejection
from specplus_kernels.tree_stage import tree_stage
from specplus_kernels.tree_verify import tree_verify

from tests.kernels.attention_case import chain, make_case, random_tree
from tests.kernels.verify_case import batch

Tensors = dict[str, Any]
Case = tuple[Callable[[], Tensors], Callable[[Tensors], object]]
PARENTS = [[-1, 0, 0, 1], [-1, 0, 1, 2]]
NUM_ROWS = 8


def attention() -> Tensors:
    contexts = [40 + int(torch.randint(9, ())), 33]
    case = make_case([random_tree(5), chain(3)], contexts)
    return {name: torch.nan_to_num(tensor) for name, tensor in case.tensors.items()}


def run_attention(given: Tensors) -> torch.Tensor:
    return tree_attention(**given, scale=0.125, out=torch.zeros_like(given["query"]))


def rows(vocab_size: int = 40) -> Tensors:
    case = batch(PARENTS, seed=int(torch.randint(1 << 30, ())))
    return {
        "logits": torch.randn(NUM_ROWS, vocab_size),
        "draft_logits": torch.randn(NUM_ROWS, vocab_size),
        "draft_tokens": torch.randint(vocab_size, (NUM_ROWS,)),
        "parents": case.parents,
        "cu_num_rows": case.cu_num_rows,
        "temperature": torch.ones(NUM_ROWS),
        "seeds": case.seeds,
        "positions": case.positions,
    }


def run_verify(given: Tensors) -> object:
    return tree_verify(
        *(given[n] for n in ("logits", "draft_tokens", "parents", "cu_num_rows")),
        *(given[n] for n in ("temperature", "seeds", "positions")),
        max_rows=4,
    )


def sampled(given: Tensors, **chosen: Any) -> dict[str, Any]:
    """Arguments that both ops of sampled drafts take."""
    return {name: given[name] for name in given if name != "parents"} | {
        "is_sampled": None,
        "max_rows": 4,
        **chosen,
    }


def moves() -> Tensors:
    """Of two requests; the second has one move less."""
    first = int(torch.randint(2, 5, ()))
    return {
        "cache": torch.randn(4, 16, 2, 8),
        "src": torch.tensor([[first, first + 3], [40, -1]]),
        "dst": torch.tensor([[1, 2], [39, -1]]),
    }


def run_kv_commit(given: Tensors) -> torch.Tensor:
    plan = PLANS.setdefault(given["cache"].data_ptr(), KVCommitPlan([given["cache"]]))
    plan(given["src"], given["dst"])
    return given["cache"]


def run_row_commit(given: Tensors) -> torch.Tensor:
    row_commit([given["cache"].view(64, -1)], given["src"], given["dst"])
    return given["cache"]


def stage() -> Tensors:
    steps = torch.randint(2, (2, 3)) * torch.tensor([0, 1, 2])
    start = torch.tensor([0, 4, 8], dtype=torch.int32)
    return {
        "codes": torch.randint(99, (2, 3)) | steps << 32,
        "query_start_loc": start,
        "cu_num_rows": start.clone(),
        "positions": torch.arange(8) % 4 + torch.randint(50, ()),
        "ancestor_mask": torch.zeros(8, 1, dtype=torch.int64),
    }


def run_stage(given: Tensors) -> list[torch.Tensor]:
    tree_stage(**given)
    return [given["positions"], given["ancestor_mask"]]


def history() -> Tensors:
    return {
        "tokens": torch.randint(3, (2, 64)),
        "lens": torch.randint(20, 64, (2,)),
        "idx_mapping": torch.randperm(2),
    }


def candidates() -> Tensors:
    return {
        "tokens": torch.randint(50, (2, 6)),
        "parents": torch.tensor([[-1, -1, 0, 0, 1, 1]] * 2),
        "scores": torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]] * 2) * (1 + torch.rand(())),
    }


PLANS: dict[int, KVCommitPlan] = {}
CASES: dict[str, Case] = {
    "tree_attention": (attention, run_attention),
    "tree_verify": (rows, run_verify),
    "rejection": (rows, lambda given: rejection("block", **sampled(given))),
    "tree_rejection": (
        rows,
        lambda given: tree_rejection("traversal", **sampled(given, parents=given["parents"])),
    ),
    "kv_commit": (moves, run_kv_commit),
    "row_commit": (moves, run_row_commit),
    "tree_stage": (stage, run_stage),
    "ngram_match": (
        history,
        lambda given: ngram_match(**given, min_n=1, max_n=3, num_nodes=6, max_depth=3),
    ),
    "rerank": (candidates, lambda given: rerank(**given, num_nodes=4)),
}


def tensors_of(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    assert isinstance(result, tuple | list)
    return [tensor for part in result for tensor in tensors_of(part)]


def captured(call: Callable[[], object]) -> tuple[list[torch.Tensor], Callable[[], None]]:
    """The outputs of `call`, and what computes them anew from the inputs as they are then."""
    outputs = tensors_of(call())  # compiles
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = tensors_of(call())
        return outputs, graph.replay

    def again() -> None:
        for output, new in zip(outputs, tensors_of(call()), strict=True):
            output.copy_(new)

    return outputs, again


@pytest.mark.parametrize("op", CASES)
def test_replay_on_other_inputs(gpu_provider: str, op: str) -> None:
    make, run = CASES[op]
    static, fresh = make(), make()
    outputs, replay = captured(lambda: run(static))
    for name, tensor in static.items():
        tensor.copy_(fresh[name])
    replay()
    for found, wanted in zip(outputs, tensors_of(run(fresh)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
