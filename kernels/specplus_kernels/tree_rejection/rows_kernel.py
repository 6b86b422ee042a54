"""tree_rejection's first kernels: links of the trees, softmax of the rows, p and q of the nodes."""

from __future__ import annotations

import triton
import triton.language as tl

from specplus_kernels.sampling.kernel import LARGEST, clean, coin, noised_argmax

# Fields of the scratch arrays, each [fields, num_rows] or [fields, num_rows, splits].
FIRST_CHILD, NEXT_SIBLING, PARENT, KIND, DRAWN = (tl.constexpr(i) for i in range(5))
LEAF, DETERMINISTIC, SAMPLED = (tl.constexpr(i) for i in range(3))  # kinds: by its children
PROB, DRAFT_PROB, COIN, TARGET_MAX, TARGET_INV, DRAFT_MAX, DRAFT_INV = (
    tl.constexpr(i) for i in range(7)
)
PART_MAX, PART_SUM, PART_DRAFT_MAX, PART_DRAFT_SUM, PART_LEAN = (tl.constexpr(i) for i in range(5))


@triton.jit
def _links_kernel(
    links_ptr,
    numbers_ptr,
    draft_tokens_ptr,
    parents_ptr,
    is_sampled_ptr,
    cu_num_rows_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    num_rows,
    vocab_size,
    IS_CHAIN: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    req = tl.program_id(0)
    start = tl.load(cu_num_rows_ptr + req)
    count = tl.load(cu_num_rows_ptr + req + 1) - start
    if count <= 0:
        return
    row = tl.arange(0, ROWS)
    is_row = row < count
    is_greedy = tl.load(temperature_ptr + start) == 0.0
    if IS_CHAIN:
        parent = row - 1
    else:
        parent = tl.load(parents_ptr + start + row, mask=is_row, other=-1).to(tl.int32)
    first_child = tl.full((ROWS,), ROWS, tl.int32)
    next_sibling = tl.full((ROWS,), ROWS, tl.int32)
    kind = tl.full((ROWS,), LEAF, tl.int32)
    for block in range(0, count, COLUMNS):
        node = block + tl.arange(0, COLUMNS)
        is_node = (node > 0) & (node < count)
        token = tl.load(draft_tokens_ptr + start + node, mask=is_node, other=-1)
        is_node = is_node & (token >= 0) & (token < vocab_size)
        if IS_CHAIN:
            above = node - 1
        else:
            above = tl.load(parents_ptr + start + node, mask=is_node, other=-1).to(tl.int32)
        is_child = is_node[None, :] & (above[None, :] == row[:, None])
        is_younger = (
            is_node[None, :] & (above[None, :] == parent[:, None]) & (node[None, :] > row[:, None])
        )
        first_child = tl.minimum(first_child, tl.min(tl.where(is_child, node[None, :], ROWS), 1))
        next_sibling = tl.minimum(
            next_sibling, tl.min(tl.where(is_younger, node[None, :], ROWS), 1)
        )
        child_kind = tl.full((COLUMNS,), SAMPLED if HAS_DRAFT else DETERMINISTIC, tl.int32)
        if HAS_DRAFT and HAS_KINDS:
            drawn = tl.load(is_sampled_ptr + start + node, mask=is_node, other=0)
            child_kind = tl.where(drawn != 0, SAMPLED, DETERMINISTIC)
        kind = tl.maximum(kind, tl.max(tl.where(is_child, child_kind[None, :], LEAF), 1))
    drawn = tl.full((ROWS,), 1 if HAS_DRAFT else 0, tl.int32)
    if HAS_DRAFT and HAS_KINDS:
        drawn = tl.load(is_sampled_ptr + start + row, mask=is_row, other=0).to(tl.int32)
    # At temperature 0 p is a point mass: every node is verified as a deterministic one.
    kind = tl.where(is_greedy, tl.minimum(kind, DETERMINISTIC), kind)
    drawn = tl.where(is_greedy, 0, drawn)
    at = links_ptr + start + row
    stride = num_rows
    first_child = tl.where(first_child < ROWS, start + first_child, -1)
    next_sibling = tl.where(next_sibling < ROWS, start + next_sibling, -1)
    tl.store(at + FIRST_CHILD * stride, first_child, mask=is_row)
    tl.store(at + NEXT_SIBLING * stride, next_sibling, mask=is_row)
    tl.store(at + PARENT * stride, tl.where(row > 0, start + parent, -1), mask=is_row)
    tl.store(at + KIND * stride, kind, mask=is_row)
    tl.store(at + DRAWN * stride, drawn, mask=is_row)
    coins = coin(tl.load(seeds_ptr + start), tl.load(positions_ptr + start), row)
    tl.store(numbers_ptr + COIN * stride + start + row, coins, mask=is_row)


@triton.jit
def _stats_kernel(
    parts_ptr,
    part_token_ptr,
    links_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    cu_num_rows_ptr,
    temperature_ptr,
    num_reqs,
    num_rows,
    vocab_size,
    split_size,
    HAS_DRAFT: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(cu_num_rows_ptr + num_reqs):
        return
    kind = tl.load(links_ptr + KIND * num_rows + row)
    if kind == LEAF:
        return
    start = tl.program_id(1) * split_size
    end = tl.minimum(start + split_size, vocab_size)
    field = tl.num_programs(1) * num_rows
    part = row * tl.num_programs(1) + tl.program_id(1)
    out = parts_ptr + part
    target_ptr = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    if temperature == 0.0:
        top, total, token = _argmax_part(target_ptr, start, end, temperature, BLOCK)
        tl.store(part_token_ptr + part, token)
        tl.store(out + PART_MAX * field, top)
        tl.store(out + PART_SUM * field, total)
    else:
        top, total, lean = _softmax_part(target_ptr, start, end, BLOCK, ENTROPY)
        tl.store(out + PART_MAX * field, top)
        tl.store(out + PART_SUM * field, total)
        if ENTROPY:
            tl.store(out + PART_LEAN * field, lean)
    if HAS_DRAFT:  # noqa: SIM102, a constexpr
        if kind == SAMPLED:
            draft_ptr = draft_logits_ptr + row * draft_logits_stride
            draft_top, draft_total, _ = _softmax_part(draft_ptr, start, end, BLOCK, False)
            tl.store(out + PART_DRAFT_MAX * field, draft_top)
            tl.store(out + PART_DRAFT_SUM * field, draft_total)


@triton.jit
def _softmax_part(row_ptr, start, end, BLOCK: tl.constexpr, ENTROPY: tl.constexpr):
    """Max, sum of e^(l - max) (NaN if the part holds one), sum of e^(l - max) (l - max)."""
    top = tl.full((), -LARGEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    lean = tl.full((), 0.0, tl.float32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, end, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + tokens, mask=tokens < end, other=float("-inf")).to(tl.float32)
        nans |= (logits != logits).to(tl.int32)
        logits = clean(logits)
        new_top = tl.maximum(top, tl.max(logits, 0))
        weights = tl.exp(logits - new_top)
        fade = tl.exp(top - new_top)
        if ENTROPY:
            leans = tl.where(weights > 0.0, weights * (logits - new_top), 0.0)
            moved = tl.where(total > 0.0, total * (top - new_top), 0.0)
            lean = tl.where(fade > 0.0, (lean + moved) * fade, 0.0) + tl.sum(leans, 0)
        total = total * fade + tl.sum(weights, 0)
        top = new_top
    total = tl.where(tl.max(nans, 0) > 0, float("nan"), total)
    return top, total, lean


@triton.jit
def _argmax_part(row_ptr, start, end, temperature, BLOCK: tl.constexpr):
    """Max, 0 (NaN if the part holds one), first token of the max; temperature is 0."""
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, end, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + tokens, mask=tokens < end, other=float("-inf")).to(tl.float32)
        nans |= (logits != logits).to(tl.int32)
        best, token = noised_argmax(best, token, clean(logits), tokens, 0, temperature)
    return best, tl.where(tl.max(nans, 0) > 0, float("nan"), 0.0), token


@triton.jit
def _nodes_kernel(
    numbers_ptr,
    links_ptr,
    parts_ptr,
    part_token_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    draft_tokens_ptr,
    cu_num_rows_ptr,
    temperature_ptr,
    num_reqs,
    num_rows,
    vocab_size,
    epsilon,
    delta,
    HAS_DRAFT: tl.constexpr,
    TYPICAL_RULE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64)
    if node >= tl.load(cu_num_rows_ptr + num_reqs):
        return
    parent = tl.load(links_ptr + PARENT * num_rows + node).to(tl.int64)
    token = tl.load(draft_tokens_ptr + node)
    if (parent < 0) | (token < 0) | (token >= vocab_size):
        return
    field = num_rows * SPLITS
    prob = 0.0
    if tl.load(temperature_ptr + parent) == 0.0:
        part = parent * SPLITS + tl.arange(0, SPLITS)
        tops = tl.load(parts_ptr + PART_MAX * field + part)
        zero = tl.sum(tl.load(parts_ptr + PART_SUM * field + part), 0)
        is_top = (tops == tl.max(tops, 0)) & (tops > float("-inf"))
        best = tl.min(tl.where(is_top, tl.load(part_token_ptr + part), 0x7FFFFFFF), 0)
        best = tl.where(best == 0x7FFFFFFF, 0, best)
        prob = tl.where(token == best, 1.0, 0.0) + zero
        if TYPICAL_RULE:
            prob = tl.where(prob > 0.0, 1.0, 0.0)
    else:
        top, inverse = _combine(parts_ptr, parent, field, PART_MAX, PART_SUM, SPLITS)
        logit = tl.load(logits_ptr + parent * logits_stride + token).to(tl.float32)
        prob = tl.exp(clean(logit) - top) * inverse
        tl.store(numbers_ptr + TARGET_MAX * num_rows + parent, top)
        tl.store(numbers_ptr + TARGET_INV * num_rows + parent, inverse)
        if TYPICAL_RULE:
            at = parts_ptr + parent * SPLITS + tl.arange(0, SPLITS)
            part_tops, totals = tl.load(at + PART_MAX * field), tl.load(at + PART_SUM * field)
            leans = tl.load(at + PART_LEAN * field) + totals * (part_tops - top)
            leans = tl.where(totals > 0.0, tl.exp(part_tops - top) * leans, 0.0)
            entropy = -tl.log(inverse) - tl.sum(leans, 0) * inverse
            threshold = tl.minimum(epsilon, delta * tl.exp(-entropy))
            prob = tl.where(prob > threshold, 1.0, 0.0)
    tl.store(numbers_ptr + PROB * num_rows + node, prob)
    tl.store(numbers_ptr + DRAFT_PROB * num_rows + node, 0.0)
    if HAS_DRAFT:  # noqa: SIM102, a constexpr
        if tl.load(links_ptr + KIND * num_rows + parent) == SAMPLED:
            top, inverse = _combine(
                parts_ptr, parent, field, PART_DRAFT_MAX, PART_DRAFT_SUM, SPLITS
            )
            logit = tl.load(draft_logits_ptr + parent * draft_logits_stride + token).to(tl.float32)
            draft_prob = tl.exp(clean(logit) - top) * inverse
            tl.store(numbers_ptr + DRAFT_PROB * num_rows + node, draft_prob)
            tl.store(numbers_ptr + DRAFT_MAX * num_rows + parent, top)
            tl.store(numbers_ptr + DRAFT_INV * num_rows + parent, inverse)


@triton.jit
def _combine(parts_ptr, row, field, MAX: tl.constexpr, SUM: tl.constexpr, SPLITS: tl.constexpr):
    """A row's max and 1 / (sum of e^(l - max)): NaN if the row holds one, 0 if it is all -inf."""
    part = parts_ptr + row * SPLITS + tl.arange(0, SPLITS)
    tops, totals = tl.load(part + MAX * field), tl.load(part + SUM * field)
    top = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - top), 0)
    return top, tl.where(total == 0.0, 0.0, 1.0 / total)
