"""tree_attention against float64 from first principles, and its contract.

Seen to fail: a bit too many in the mask, the second ancestor word dropped, a window off by one,
slots taken for positions, masked values multiplied by 0, `decay` left out, sinks without log2(e),
bf16 pairs stored unsorted; of AMX's pairs the second left out, exchanged, or read although masked;
in Triton also: sinks in every split, splits combined unweighted, a tile
lost between splits, a slot past the tail, the window's edge unmasked, the rest of a head that is no
power of two left out, fp8 scales and subnormals left out, NaN hidden from the rows that see it.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, Literal

import pytest
import torch
from specplus_kernels import cpu_library, dispatch
from specplus_kernels.tree_attention import tree_attention

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
# The Triton kernel also rounds the probabilities: the sum of p * |v|, up to about 2 here, moves by
# that share. Triton's interpreter truncates to bf16, which is a whole unit in the last place.
TRITON_ATOL = {torch.float32: ATOL, torch.bfloat16: 2**-7, torch.float16: 2**-11}
TREES = {"chain": chain, "star": star, "full": full, "random": random_tree}


def on(shapes: Iterable[Any], triton: Iterable[Any]) -> pytest.MarkDecorator:
    """All `shapes` on the reference and the CPU, `triton` on the slow interpreter of Triton."""
    params = [(which, shape) for which in ("reference", "cpu") for shape in shapes]
    params += [("triton", shape) for shape in triton]
    ids = [f"{which}-{shape}" for which, shape in params]
    return pytest.mark.parametrize(
        ("any_provider", "shape"), params, ids=ids, indirect=["any_provider"]
    )


def assert_right(case: Case, provider: str) -> None:
    atol = TRITON_ATOL[case.dtype] if provider == "triton" else ATOL
    torch.testing.assert_close(
        case.run().double(), dense_answer(case), atol=atol, rtol=RTOL[case.dtype]
    )


@on(
    list(product(RTOL, TREES, [1, 2, 5, 17])),
    triton=[
        (torch.float32, "chain", 1),
        (torch.float32, "full", 17),
        (torch.bfloat16, "random", 17),
        (torch.bfloat16, "chain", 2),
        (torch.float16, "star", 5),
    ],
)
def test_trees(any_provider: str, shape: tuple[torch.dtype, str, int]) -> None:
    dtype, tree, rows = shape
    assert_right(make_case([TREES[tree](rows)], [40], dtype=dtype), any_provider)


@on([63, 64, 65, 128], triton=[64, 65, 128])
def test_many_rows(any_provider: str, shape: int) -> None:
    dtype = torch.float16 if any_provider == "triton" else torch.float32
    assert_right(make_case([random_tree(shape)], [70], head_size=32, dtype=dtype), any_provider)


@on(
    list(
        product(
            RTOL,
            [(4, 1, 256, 128), (8, 8, 80, 32), (16, 1, 112, 96), (12, 4, 48, 48), (2, 2, 16, 256)],
        )
    ),
    triton=[
        (torch.bfloat16, (4, 1, 256, 128)),
        (torch.float16, (4, 4, 80, 16)),
        (torch.bfloat16, (16, 1, 96, 16)),
        (torch.bfloat16, (8, 1, 192, 48)),
        (torch.float32, (3, 1, 112, 32)),
        (torch.bfloat16, (8, 1, 128, 256)),
    ],
)
def test_shapes(any_provider: str, shape: tuple[torch.dtype, tuple[int, int, int, int]]) -> None:
    dtype, (heads, kv_heads, head_size, block_size) = shape
    case = make_case(
        [random_tree(rows) for rows in (1, 9, 3)],
        [block_size - 1, block_size, 100],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        layout="v2" if any_provider == "triton" else "vec",
    )
    assert_right(case, any_provider)


def test_ragged_batch(any_provider: str) -> None:
    contexts = [0, 1, 31, 32, 33, 500, 7, 64]
    parents = [random_tree(rows) for rows in (1, 7, 12, 1, 33, 4, 70, 2)]
    assert_right(make_case(parents, contexts), any_provider)


def test_empty_request(any_provider: str) -> None:
    case = make_case([random_tree(3), [], random_tree(2)], [5, 40, 0])
    assert_right(case, any_provider)
    assert_right(make_case([[]], [7]), any_provider)


@pytest.mark.slow
def test_long_context(any_provider: str) -> None:
    case = make_case([random_tree(4)], [8191], head_size=32, num_kv_heads=1, block_size=128)
    assert_right(case, any_provider)


@on(
    list(product(TREES, [1, 2, 5, 16, 33, 64, 1000])),
    triton=[("random", 1), ("chain", 5), ("star", 2), ("random", 33), ("full", 1000)],
)
def test_sliding_window(any_provider: str, shape: tuple[str, int]) -> None:
    tree, window = shape
    case = make_case([TREES[tree](20), TREES[tree](3)], [70, 0])
    case.options["sliding_window"] = window
    assert_right(case, any_provider)


def test_long_window(any_provider: str) -> None:
    """Full tiles between the window's edge and the tail, and blocks before it that are gone."""
    layout: Any = "vec" if any_provider == "cpu" else "plain"
    case = make_case([random_tree(7)], [300], num_kv_heads=1, layout=layout)
    case.tensors["block_table"][0, :3] = 0  # 300 - 150 > 3 * 32
    case.options["sliding_window"] = 150
    assert_right(case, any_provider)


@on(list(product([0.5, 30.0], [None, -1, 9])), triton=[(0.5, 9), (30.0, None)])
def test_soft_cap_and_sinks(any_provider: str, shape: tuple[float, int | None]) -> None:
    cap, window = shape
    case = make_case([random_tree(11), chain(2)], [33, 80])
    case.options.update(logits_soft_cap=cap, sliding_window=window, sinks=3 * torch.randn(4))
    assert_right(case, any_provider)


@pytest.mark.parametrize("gpu_provider", ["triton"], indirect=True)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_splits(gpu_provider: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some splits have no slots, and the sinks count once."""
    from specplus_kernels.tree_attention import kernel

    monkeypatch.setattr(kernel, "_num_splits", lambda *_: splits)
    case = make_case([random_tree(19), [], chain(1)], [200, 3, 0], num_heads=4, num_kv_heads=1)
    case.options.update(sinks=torch.randn(4), sliding_window=170, max_query_len=19)
    assert_right(case, gpu_provider)


@pytest.mark.parametrize("gpu_provider", ["triton"], indirect=True)
def test_splits_are_combined_in_chunks(gpu_provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from specplus_kernels.tree_attention import kernel

    monkeypatch.setattr(kernel, "_num_splits", lambda *_: 40)
    assert kernel.COMBINE_TILE // 256 < 40
    case = make_case([chain(1)], [700], num_heads=1, num_kv_heads=1, head_size=256)
    assert_right(case, gpu_provider)


def test_number_of_splits() -> None:
    pytest.importorskip("triton")
    from specplus_kernels.tree_attention import kernel

    tiles, cpu = kernel._Tiles(64, 64, 4, 3), torch.device("cpu")
    assert kernel._num_splits(8, 32768, tiles, cpu) == 2 * kernel.DEFAULT_SMS // 8
    assert kernel._num_splits(8, 256, tiles, cpu) == 2  # shares of twice the rows
    assert kernel._num_splits(1000, 32768, tiles, cpu) == 1


@pytest.mark.parametrize("gpu_provider", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("window", [None, 3, 9])
def test_draft_level(gpu_provider: str, window: int | None) -> None:
    """The tail is the whole tree, the rows are its last level."""
    parents = [random_tree(12), random_tree(70), star(4)]
    case = make_case(parents, [33, 5, 0], skipped=[8, 60, 1])
    case.options["sliding_window"] = window
    assert_right(case, gpu_provider)


@pytest.mark.parametrize("gpu_provider", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("layout", ["v2", "plain"])
def test_fp8_cache(gpu_provider: str, layout: Literal["v2", "plain"]) -> None:
    case = make_case(
        [random_tree(9), chain(3)],
        [40, 5],
        dtype=torch.bfloat16,
        cache_dtype=torch.float8_e4m3fn,
        layout=layout,
    )
    case.options.update(k_scale=torch.tensor([1.7]), v_scale=torch.tensor(0.3))
    assert_right(case, gpu_provider)


@pytest.mark.parametrize("gpu_provider", ["triton"], indirect=True)
def test_every_fp8_code(gpu_provider: str) -> None:
    """One slot alone has weight 1, so the output is its value."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    out = torch.empty(8, 1, 32)
    tree_attention(
        torch.zeros(8, 1, 32),
        torch.zeros(8, 1, 1, 32).to(codes.dtype),
        codes.view(8, 1, 1, 32),
        torch.arange(8, dtype=torch.int32)[:, None],
        torch.arange(9, dtype=torch.int32),
        torch.zeros(8, dtype=torch.int32),
        torch.ones(8, 1, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
        scale=1.0,
        out=out,
    )
    finite = codes.float().view(8, 1, 32)
    assert torch.equal(out[[0, 1, 2, 4, 5, 6]], finite[[0, 1, 2, 4, 5, 6]])
    assert out[[3, 7]].isnan().all()  # the rows with a NaN code, as in any dtype


@pytest.mark.parametrize("gpu_provider", ["reference", "triton"], indirect=True)
def test_chain_is_causal(gpu_provider: str) -> None:
    case = make_case([chain(20)], [30], num_kv_heads=4, block_size=64, layout="plain")
    block = case.tensors["block_table"][0, 0]
    keys, values = (case.tensors[name][block, :50] for name in ("key_cache", "value_cache"))
    query = torch.cat([torch.zeros(30, 4, 64), case.tensors["query"]])
    query, keys, values = (tensor.transpose(0, 1) for tensor in (query, keys, values))
    causal = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    torch.testing.assert_close(case.run(), causal.transpose(0, 1)[30:], atol=ATOL, rtol=ATOL)


def test_row_that_sees_nothing(any_provider: str) -> None:
    case = make_case([chain(3)], [0])
    case.tensors["ancestor_mask"][1] = 0
    out = case.run()
    assert (out[1] == 0).all()
    assert out[[0, 2]].isfinite().all()


def test_large_scores(any_provider: str) -> None:
    case = make_case([random_tree(6)], [150])
    case.tensors["query"] *= 60  # softmax over scores of some hundreds
    torch.testing.assert_close(case.run().double(), dense_answer(case), atol=2e-3, rtol=2e-3)


def test_masked_garbage_stays_out(any_provider: str) -> None:
    case = make_case([[-1, 0, 0, 1, 2]], [33])
    clean = case.run()
    slot = case.slot(0, 33 + 2)  # row 2, an ancestor of row 4 and of itself
    case.tensors["key_cache"][slot] = torch.inf
    case.tensors["value_cache"][slot] = torch.nan
    dirty = case.run()
    blind, seeing = [0, 1, 3], [2, 4]
    torch.testing.assert_close(dirty[blind], clean[blind], atol=0, rtol=0)
    assert dirty[seeing].isnan().all()


def test_non_finite_value_alone(any_provider: str) -> None:
    case = make_case([[-1, 0, 0]], [3])
    clean = case.run()
    case.tensors["value_cache"][case.slot(0, 3 + 1)] = torch.inf
    dirty = case.run()
    assert not dirty[1].isfinite().any()
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]], atol=0, rtol=0)


def test_only_the_chosen_requests(any_provider: str) -> None:
    case = make_case([chain(2), star(3), random_tree(4), chain(1)], [10, 20, 30, 40])
    # A request that is not chosen may be anything: here one with more rows than bits.
    out = case.run(requests=torch.tensor([3, 1], dtype=torch.int32))
    whole = case.run()
    chosen = torch.tensor([2, 3, 4, 9])
    torch.testing.assert_close(out[chosen], whole[chosen], atol=ATOL, rtol=ATOL)
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


def test_strided_query_mask_and_table(any_provider: str) -> None:
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


def test_bits_past_the_rows_are_ignored(any_provider: str) -> None:
    case = make_case([chain(3), chain(2)], [40, 5])
    expected = case.run()
    case.tensors["ancestor_mask"][2] |= ~0b111
    torch.testing.assert_close(case.run(), expected, atol=0, rtol=0)


def test_other_layout_runs_the_reference() -> None:
    case = make_case([random_tree(5)], [40], layout="plain")
    assert_right(case, "cpu")
    with dispatch.force("cpu"), pytest.raises(NotImplementedError, match="vec layout"):
        case.run()
    case = make_case([random_tree(5)], [40], skipped=[2])
    with dispatch.force("cpu"), pytest.raises(NotImplementedError, match="tail_lens"):
        case.run()


@pytest.mark.parametrize("gpu_provider", ["triton"], indirect=True)
def test_head_size_that_triton_does_not_take(gpu_provider: str) -> None:
    with pytest.raises(NotImplementedError, match="head_size 8"):
        make_case([chain(2)], [4], head_size=8, layout="plain").run()


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
        ({"value_cache": torch.zeros(5, 32, 2, 64, dtype=torch.bfloat16)}, "like query"),
        ({"block_table": torch.zeros(1, 1, dtype=torch.int32)}, "request 0 reads"),
        ({"block_table": torch.zeros(2, 3, dtype=torch.int32)}, "rows of block_table"),
        ({"ancestor_mask": torch.zeros(3, 1, dtype=torch.int64)}, "rows of ancestor_mask"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"tail_lens": torch.zeros(1)}, "tail_lens must be"),
        ({"tail_positions": torch.zeros(2, 4, dtype=torch.int64)}, "tail_positions must be"),
        ({"k_scale": torch.zeros(2)}, "k_scale"),
    ],
)
def test_errors(provider: str, changes: dict[str, torch.Tensor], message: str) -> None:
    case = make_case([chain(4)], [40])
    with pytest.raises(ValueError, match=message):
        case.run(**changes)


def test_a_window_needs_the_positions_of_the_tail() -> None:
    case = make_case([chain(4)], [40], skipped=[2])
    with pytest.raises(ValueError, match="need tail_positions"):
        case.run(tail_positions=None, sliding_window=5)
