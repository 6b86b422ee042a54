"""tree_attention against float64 from first principles, and its contract.

Seen to fail: a bit too many in the mask, the second ancestor word dropped, a window off by one,
slots taken for positions, masked values multiplied by 0, `decay` left out, sinks without log2(e),
bf16 pairs stored unsorted.
"""

from __future__ import annotations

import pytest
import torch
from specplus_kernels import cpu_library, dispatch

from tests.kernels.attention_case import (
    Case,
    chain,
    dense_answer,
    full,
    make_case,
    random_tree,
    star,
)

# fp32: summation order over some hundred terms. bf16, fp16: one rounding of the output (half a
# unit in the last place, 2^-9 and 2^-12 of the value) plus the same sums.
ATOL = 2e-5
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TREES = {"chain": chain, "star": star, "full": full, "random": random_tree}


def assert_right(case: Case) -> None:
    torch.testing.assert_close(
        case.run().double(), dense_answer(case), atol=ATOL, rtol=RTOL[case.dtype]
    )


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
def test_trees(provider: str, dtype: torch.dtype, tree: str, rows: int) -> None:
    assert_right(make_case([TREES[tree](rows)], [40], dtype=dtype))


@pytest.mark.parametrize("rows", [63, 64, 65, 128])
def test_many_rows(provider: str, rows: int) -> None:
    assert_right(make_case([random_tree(rows)], [70], head_size=32))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size"),
    [(4, 1, 256, 128), (8, 8, 80, 32), (16, 1, 112, 96), (12, 4, 48, 48), (2, 2, 16, 256)],
)
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_shapes(
    provider: str, heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    parents = [random_tree(rows) for rows in (1, 9, 3)]
    case = make_case(
        parents,
        [block_size - 1, block_size, 200],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
    )
    assert_right(case)


def test_ragged_batch(provider: str) -> None:
    contexts = [0, 1, 31, 32, 33, 500, 7, 64]
    parents = [random_tree(rows) for rows in (1, 7, 12, 1, 33, 4, 70, 2)]
    assert_right(make_case(parents, contexts))


def test_empty_request(provider: str) -> None:
    case = make_case([random_tree(3), [], random_tree(2)], [5, 40, 0])
    assert_right(case)


def test_long_context(provider: str) -> None:
    case = make_case([random_tree(4)], [8191], head_size=32, num_kv_heads=1, block_size=128)
    assert_right(case)


@pytest.mark.parametrize("window", [1, 2, 5, 16, 33, 64, 1000])
@pytest.mark.parametrize("tree", TREES)
def test_sliding_window(provider: str, tree: str, window: int) -> None:
    case = make_case([TREES[tree](20), TREES[tree](3)], [70, 0])
    case.options["sliding_window"] = window
    assert_right(case)


@pytest.mark.parametrize("cap", [0.5, 30.0])
@pytest.mark.parametrize("window", [None, -1, 9])
def test_soft_cap_and_sinks(provider: str, cap: float, window: int | None) -> None:
    case = make_case([random_tree(11), chain(2)], [33, 80])
    case.options.update(logits_soft_cap=cap, sliding_window=window, sinks=3 * torch.randn(4))
    assert_right(case)


def test_large_scores(provider: str) -> None:
    case = make_case([random_tree(6)], [150])
    case.tensors["query"] *= 60  # softmax over scores of some hundreds
    torch.testing.assert_close(case.run().double(), dense_answer(case), atol=2e-3, rtol=2e-3)


def test_masked_garbage_stays_out(provider: str) -> None:
    case = make_case([[-1, 0, 0, 1, 2]], [33])
    clean = case.run()
    slot = case.slot(0, 33 + 2)  # row 2, an ancestor of row 4 and of itself
    case.tensors["key_cache"][slot] = torch.inf
    case.tensors["value_cache"][slot] = torch.nan
    dirty = case.run()
    blind, seeing = [0, 1, 3], [2, 4]
    torch.testing.assert_close(dirty[blind], clean[blind], atol=0, rtol=0)
    assert dirty[seeing].isnan().all()


def test_non_finite_value_alone(provider: str) -> None:
    case = make_case([[-1, 0, 0]], [3])
    clean = case.run()
    case.tensors["value_cache"][case.slot(0, 3 + 1)] = torch.inf
    dirty = case.run()
    assert not dirty[1].isfinite().any()
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]], atol=0, rtol=0)


def test_only_the_chosen_requests(provider: str) -> None:
    case = make_case([chain(2), star(3), random_tree(4), chain(1)], [10, 20, 30, 40])
    # A request that is not chosen may be anything: here one with more rows than bits.
    out = case.run(requests=torch.tensor([3, 1], dtype=torch.int32))
    whole = case.run()
    chosen = torch.tensor([2, 3, 4, 9])
    torch.testing.assert_close(out[chosen], whole[chosen], atol=0, rtol=0)
    rest = torch.ones(len(out), dtype=torch.bool)
    rest[chosen] = False
    assert out[rest].isnan().all()


def test_chosen_among_prefills(provider: str) -> None:
    case = make_case([chain(70), random_tree(4)], [0, 30])
    case.tensors["ancestor_mask"] = case.tensors["ancestor_mask"][:, :1]  # 64 bits for 70 rows
    out = case.run(requests=torch.tensor([1], dtype=torch.int32))
    torch.testing.assert_close(out[70:].double(), dense_answer(case)[70:], atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="request 0 has"):
        case.run()


def test_strided_query_mask_and_table(provider: str) -> None:
    case = make_case([random_tree(5), chain(2)], [40, 3])
    expected = case.run()
    packed = torch.randn(7, 3 * 4, 64)  # query, key and value of a row side by side
    packed[:, :4] = case.tensors["query"]
    table = torch.zeros(2, 9, dtype=torch.int32)
    table[:, :2] = case.tensors["block_table"]
    mask = torch.full((7, 2), -1)
    mask[:, 0] = case.tensors["ancestor_mask"][:, 0]
    out = torch.full((7, 8, 64), torch.nan)
    case.run(query=packed[:, :4], block_table=table, ancestor_mask=mask, out=out[:, 2:6])
    torch.testing.assert_close(out[:, 2:6], expected, atol=0, rtol=0)
    assert out[:, :2].isnan().all() and out[:, 6:].isnan().all()


def test_bits_past_the_rows_are_ignored(provider: str) -> None:
    case = make_case([chain(3), chain(2)], [40, 5])
    expected = case.run()
    case.tensors["ancestor_mask"][2] |= ~0b111
    torch.testing.assert_close(case.run(), expected, atol=0, rtol=0)


def test_other_layout_runs_the_reference() -> None:
    case = make_case([random_tree(5)], [40], vec_layout=False)
    assert_right(case)
    with dispatch.force("cpu"), pytest.raises(NotImplementedError, match="vec layout"):
        case.run()


@pytest.mark.skipif(cpu_library.load() is None, reason="no C++ kernels in this installation")
def test_row_does_not_depend_on_its_batch() -> None:
    """Bit for bit: so a row's logits do not depend on which drafts ride along."""
    parents, contexts = [chain(6), random_tree(9)], [50, 100]
    case = make_case(parents, contexts, num_heads=4, num_kv_heads=1, dtype=torch.bfloat16)
    with dispatch.force("cpu"):
        whole = case.run()
        for row in range(6):  # decode the chain's rows one at a time
            alone = case.run(
                query=case.tensors["query"][row : row + 1],
                out=torch.empty_like(whole[:1]),
                block_table=case.tensors["block_table"][:1],
                query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
                context_lens=torch.tensor([50 + row], dtype=torch.int32),
                ancestor_mask=torch.ones(1, 1, dtype=torch.int64),
                positions=torch.tensor([50 + row]),
            )
            assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_table": torch.zeros(1, 3)}, "int32"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "int64"),
        ({"out": torch.zeros(4, 4, 64, dtype=torch.bfloat16)}, "one dtype"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "request 0 reads"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32)}, "rows of block_table"),
        ({"ancestor_mask": torch.zeros(3, 1, dtype=torch.int64)}, "rows of ancestor_mask"),
        ({"sinks": torch.zeros(3)}, "sinks"),
    ],
)
def test_errors(provider: str, changes: dict[str, torch.Tensor], message: str) -> None:
    case = make_case([chain(4)], [40])
    with pytest.raises(ValueError, match=message):
        case.run(**changes)
