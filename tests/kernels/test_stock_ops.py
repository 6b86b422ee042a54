"""Our ops against vLLM's own CPU ops, where they answer the same question."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specplus_kernels import row_argmax, row_gumbel_argmax

from tests.kernels.attention_case import Case, chain, make_case

ops = pytest.importorskip("vllm._custom_ops")
if not hasattr(torch.ops._C, "greedy_argmax"):
    pytest.skip("this vLLM has no CPU ops", allow_module_level=True)
attention_cpu = pytest.importorskip("vllm_specplus.engine.attention_cpu")

# The same sums in another order; in bf16 a sum near a rounding boundary moves one unit.
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-4}
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-7}
AMX_ATOL = 2**-8  # its probabilities are rounded to bf16 too: a sum of p * |v| of about 1


def stock_attention(
    case: Case, keys: torch.Tensor, values: torch.Tensor, layout: str
) -> torch.Tensor:
    """Writes keys and values with vLLM's op into a zeroed cache, then attends causally."""
    tensors, num_blocks = case.tensors, len(case.tensors["key_cache"])
    heads, size, dim = case.num_kv_heads, case.block_size, case.head_size
    cache = torch.zeros(num_blocks, heads, 2 * size, dim, dtype=case.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    slots = [
        block * size + offset
        for req, rows in enumerate(case.parents)
        for block, offset in (case.slot(req, i) for i in range(case.contexts[req] + len(rows)))
    ]
    where = torch.tensor(slots)
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, where, layout)
    seq_lens = tensors["context_lens"] + tensors["query_start_loc"].diff()
    window = case.options.get("sliding_window", -1)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        len(seq_lens), case.num_heads, heads, dim, seq_lens, case.dtype,
        tensors["query_start_loc"], True, window, layout, True,
    )  # fmt: skip
    out = torch.empty_like(tensors["query"])
    ops.cpu_attention_with_kv_cache(
        tensors["query"], key_cache, value_cache, out, tensors["query_start_loc"], seq_lens,
        dim**-0.5, True, None, window, tensors["block_table"],
        case.options.get("logits_soft_cap", 0.0), metadata, case.options.get("sinks"),
    )  # fmt: skip
    # What vLLM wrote is what our views must read.
    layer = SimpleNamespace(kv_cache=cache.view(num_blocks, heads, size, 2 * dim), isa=layout)
    tensors["key_cache"], tensors["value_cache"] = attention_cpu.kv_views(layer)
    return out


LAYOUTS = [(torch.float32, "vec"), (torch.bfloat16, "vec"), (torch.bfloat16, "amx")]


@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 50},
        {"logits_soft_cap": 4.0},
        {"sinks": torch.tensor([1.0, -2, 0, 3])},
    ],
    ids=["plain", "window", "cap", "sinks"],
)
def test_chain_is_causal_attention(
    provider: str, dtype: torch.dtype, layout: str, options: dict[str, Any]
) -> None:
    if layout == "amx" and not torch.cpu._init_amx():
        pytest.skip("this CPU has no AMX")
    parents = [chain(rows) for rows in (1, 8, 16, 3, 40)]
    shape = {"num_heads": 4, "num_kv_heads": 1, "head_size": 256, "block_size": 128}
    case = make_case(parents, [200, 0, 127, 300, 64], dtype=dtype, **shape)
    case.options.update(options)
    num_slots = sum(case.contexts) + sum(map(len, parents))
    keys, values = torch.randn(2, num_slots, 1, 256).to(dtype)
    expected = stock_attention(case, keys, values, layout)
    atol = AMX_ATOL if layout == "amx" else ATOL[dtype]
    torch.testing.assert_close(case.run(), expected, atol=atol, rtol=RTOL[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab_size", [7, 4096, 151_936, 262_144])
def test_argmax_is_vllms(provider: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size).to(dtype)
    logits[4] = -torch.inf
    logits[5, ::2] = -torch.inf
    expected = torch.ops._C.greedy_argmax(logits.float())
    assert torch.equal(row_argmax(logits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab_size", "spread"),
    [(700, 100, 1.0), (700, 3001, 0.0), (300, 3001, 3.0), (100, 20_000, 10.0), (8, 262_144, 2.0)],
)
def test_gumbel_is_vllms(
    provider: str, dtype: torch.dtype, rows: int, vocab_size: int, spread: float
) -> None:
    """Together 3,600 rows for each implementation; some are masked as top-k and top-p do."""
    logits = (spread * torch.randn(rows, vocab_size)).to(dtype)
    logits[::3, 1 : vocab_size // 2] = -torch.inf
    temperature, seeds = 2 * torch.rand(rows) + 0.05, torch.randint(2**31, (rows,))
    expected = torch.ops._C.fused_gumbel_argmax(logits.float() / temperature[:, None], seeds)
    assert torch.equal(row_gumbel_argmax(logits, temperature, seeds), expected)
