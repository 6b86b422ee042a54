"""tree_attention over vLLM's KV layout for AMX; what was seen to fail: test_tree_attention.py."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_case import make_case, random_tree
from tests.kernels.test_tree_attention import assert_right


@pytest.mark.parametrize("provider", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize(
    "shape", [(4, 1, 256, 128), (8, 8, 96, 32), (12, 4, 32, 64), (2, 2, 64, 96)]
)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 21}, {"logits_soft_cap": 4.0}], ids=str)
def test_amx_layout(
    provider: str, shape: tuple[int, int, int, int], options: dict[str, float]
) -> None:
    """A row that sees one slot of a pair, and slots with NaN beside those that rows see."""
    heads, kv_heads, head_size, block_size = shape
    case = make_case(
        [random_tree(rows) for rows in (1, 9, 70, 2)],
        [block_size, 17, 100, 1],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=torch.bfloat16,
        layout="amx",
    )
    case.options.update(options)
    assert_right(case, provider)
