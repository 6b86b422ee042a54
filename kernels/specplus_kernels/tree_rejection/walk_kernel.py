"""tree_rejection's walk: the path of every request, by the rule.

The residual of a node never exists as a vector. With m_0 = w p and the k-th rejected child drawn
from q_k = q without its elders / tail_k, the rules replace m by (m - q_k)+ / divisor_k. Clamped
differences collapse, so with scale_k = divisor_1 ... divisor_k

    m_k(x) = (w p(x) - taken_k q(x))+ / scale_k,   taken_k = sum over j <= k of scale_(j-1) / tail_j

and m = 0 at the tokens of rejected children: where m(x) > q_k(x) a drawn child has weight 1 and is
not rejected, and a deterministic one takes all of m(x). A pass over the row gives the mass of m_k
and tail_(k+1) where they are needed, without cancellation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specplus_kernels.sampling.kernel import clean
from specplus_kernels.tree_rejection.rows_kernel import (
    COIN,
    DRAFT_INV,
    DRAFT_MAX,
    DRAFT_PROB,
    DRAWN,
    FIRST_CHILD,
    KIND,
    NEXT_SIBLING,
    PARENT,
    PROB,
    SAMPLED,
    TARGET_INV,
    TARGET_MAX,
)

RECURSIVE, TRAVERSAL, TYPICAL = (tl.constexpr(i) for i in range(3))
TINY = tl.constexpr(1e-30)  # a floor where rounding empties a residual that cannot be empty
STATE = tl.constexpr(8)  # numbers kept of a node while the walk is below it


@triton.jit
def _walk_kernel(
    tokens_ptr,
    path_ptr,
    num_emitted_ptr,
    last_ptr,
    last_numbers_ptr,
    state_ptr,
    links_ptr,
    numbers_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    draft_tokens_ptr,
    cu_num_rows_ptr,
    num_reqs,
    num_rows,
    vocab_size,
    max_path,
    RULE: tl.constexpr,
    HAS_DRAFT: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    start = tl.load(cu_num_rows_ptr + req)
    count = tl.load(cu_num_rows_ptr + req + 1) - start
    first_child = links_ptr + FIRST_CHILD * num_rows
    next_sibling = links_ptr + NEXT_SIBLING * num_rows
    going = tl.where(count > 0, 1, 0)
    node, depth, longest, longest_depth = start, going - 1, start, going - 1
    child = tl.load(first_child + start, mask=going > 0, other=-1)
    # Of `node`: m = (weight p - taken q)+ / scale and its mass, the mass of q that is left, and the
    # number of rejected children.
    weight, taken, scale, tail, mass, elders = _fresh(1.0)
    for _ in range(2 * count):
        rejected = start * 0 - 1
        if going > 0:
            if child >= 0:
                accepted, is_nan, new_weight = _judge(
                    child, weight, taken, scale, tail, links_ptr, numbers_ptr, num_rows, RULE
                )
                if accepted & (depth < max_path):
                    if RULE == TRAVERSAL:
                        _save(state_ptr, node, weight, taken, scale, tail, mass, elders)
                    weight, taken, scale, tail, mass, elders = _fresh(new_weight)
                    node = child
                    child = tl.load(first_child + node)
                    depth += 1
                    if depth > longest_depth:
                        longest, longest_depth = node, depth
                elif is_nan | (RULE == TYPICAL):
                    child = tl.load(next_sibling + child)
                else:
                    rejected = child
            else:
                stays = _stays(node, start, mass, numbers_ptr, num_rows, RULE)
                if stays:
                    going = going * 0
                else:
                    rejected = node
                    node = tl.load(links_ptr + PARENT * num_rows + node)
                    depth -= 1
                    if RULE == TRAVERSAL:
                        weight, taken, scale, tail, mass, elders = _restore(state_ptr, node)
                    if RULE == TYPICAL:
                        child = tl.load(next_sibling + rejected)
        if RULE != TYPICAL:  # noqa: SIM102, a constexpr
            if rejected >= 0:
                child = tl.load(next_sibling + rejected)
                taken, scale, tail, mass, elders = _reject(
                    rejected,
                    node,
                    child,
                    weight,
                    taken,
                    scale,
                    tail,
                    mass,
                    elders,
                    links_ptr,
                    numbers_ptr,
                    logits_ptr,
                    logits_stride,
                    draft_logits_ptr,
                    draft_logits_stride,
                    draft_tokens_ptr,
                    num_rows,
                    vocab_size,
                    HAS_DRAFT,
                    BLOCK,
                )
    if RULE == TYPICAL:
        node, depth = longest, longest_depth
    tl.store(last_ptr + req, tl.where(depth >= 0, node, -1))
    tl.store(last_ptr + num_reqs + req, elders)
    tl.store(last_numbers_ptr + req, weight)
    tl.store(last_numbers_ptr + num_reqs + req, taken)
    tl.store(num_emitted_ptr + req, depth + 1)
    _store_path(
        path_ptr,
        tokens_ptr,
        req,
        node,
        start,
        depth,
        links_ptr,
        draft_tokens_ptr,
        num_rows,
        max_path,
        PATH,
    )


@triton.jit
def _judge(child, weight, taken, scale, tail, links_ptr, numbers_ptr, num_rows, RULE: tl.constexpr):
    """Whether to go down to `child`, whether p or q at its parent holds a NaN, its weight."""
    prob = tl.load(numbers_ptr + PROB * num_rows + child)
    draft_prob = tl.load(numbers_ptr + DRAFT_PROB * num_rows + child)
    drawn = tl.load(links_ptr + DRAWN * num_rows + child) != 0
    left = tl.maximum(weight * prob - taken * draft_prob, 0.0) / scale
    proposal = tl.where(drawn, draft_prob / tail, 1.0)
    is_nan = (prob != prob) | (draft_prob != draft_prob)
    new_weight = tl.full((), 1.0, tl.float32)
    accepted = left > 0.0
    if RULE == RECURSIVE:
        accepted = tl.load(numbers_ptr + COIN * num_rows + child) * proposal < left
    if RULE == TRAVERSAL:
        new_weight = tl.where(left < proposal, left / proposal, 1.0)
    return accepted & (is_nan == 0), is_nan, new_weight


@triton.jit
def _stays(node, start, mass, numbers_ptr, num_rows, RULE: tl.constexpr):
    """Whether the path ends at `node`, all of whose children were judged."""
    stays = node == start
    if RULE == RECURSIVE:
        stays = node >= start
    if RULE == TRAVERSAL:
        stays = stays | (tl.load(numbers_ptr + COIN * num_rows + node) < mass)
    return stays


@triton.jit
def _store_path(
    path_ptr,
    tokens_ptr,
    req,
    node,
    start,
    depth,
    links_ptr,
    draft_tokens_ptr,
    num_rows,
    max_path,
    PATH: tl.constexpr,
):
    """The rows from the root to `node` and their tokens, without the bonus."""
    step = tl.arange(0, PATH)
    path = tl.where((step == 0) & (depth >= 0), 0, -1)
    emitted = tl.full((PATH,), -1, tl.int64)
    for above in range(depth):
        path = tl.where(step == depth - above, node - start, path)
        token = tl.load(draft_tokens_ptr + node)
        emitted = tl.where(step == depth - above - 1, token, emitted)
        node = tl.load(links_ptr + PARENT * num_rows + node)
    out = req.to(tl.int64) * (max_path + 1) + step
    tl.store(path_ptr + out, path.to(tl.int64), mask=step <= max_path)
    tl.store(tokens_ptr + out, emitted, mask=step <= max_path)


@triton.jit
def _fresh(weight):
    """weight, taken, scale, tail, mass, elders of a node before any rejection."""
    one = tl.full((), 1.0, tl.float32)
    return weight * one, one * 0.0, one, one, weight * one, tl.full((), 0, tl.int32)


@triton.jit
def _save(state_ptr, node, weight, taken, scale, tail, mass, elders):
    """Keeps what `_restore` gives back."""
    at = state_ptr + node * STATE
    tl.store(at, weight)
    tl.store(at + 1, taken)
    tl.store(at + 2, scale)
    tl.store(at + 3, tail)
    tl.store(at + 4, mass)
    tl.store(at + 5, elders.to(tl.float32))


@triton.jit
def _restore(state_ptr, node):
    """What `_save` kept; the barriers order it against stores of other threads."""
    at = state_ptr + node * STATE
    tl.debug_barrier()
    weight, taken, scale = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    tail, mass = tl.load(at + 3), tl.load(at + 4)
    elders = tl.load(at + 5).to(tl.int32)
    tl.debug_barrier()
    return weight, taken, scale, tail, mass, elders


@triton.jit
def _reject(
    child,
    node,
    younger,
    weight,
    taken,
    scale,
    tail,
    mass,
    elders,
    links_ptr,
    numbers_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    draft_tokens_ptr,
    num_rows,
    vocab_size,
    HAS_DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state of `node` after `child` was rejected; `younger` is its next sibling or -1."""
    prob = tl.load(numbers_ptr + PROB * num_rows + child)
    draft_prob = tl.load(numbers_ptr + DRAFT_PROB * num_rows + child)
    drawn = tl.load(links_ptr + DRAWN * num_rows + child) != 0
    total = mass * scale - tl.maximum(weight * prob - taken * draft_prob, 0.0)
    taken += tl.where(drawn, scale / tail, 0.0)
    elders += 1
    if (younger >= 0) | (mass < 1.0):
        if HAS_DRAFT:  # noqa: SIM102, a constexpr
            if tl.load(links_ptr + KIND * num_rows + node) == SAMPLED:
                total, tail = _residual_mass(
                    node,
                    elders,
                    weight,
                    taken,
                    links_ptr,
                    numbers_ptr,
                    logits_ptr,
                    logits_stride,
                    draft_logits_ptr,
                    draft_logits_stride,
                    draft_tokens_ptr,
                    num_rows,
                    vocab_size,
                    BLOCK,
                )
        rest = tl.maximum(total, 0.0) / scale
        divisor = tl.maximum(1.0 - mass + rest, TINY)
        scale *= divisor
        mass = rest / divisor
    return taken, scale, tail, mass, elders


@triton.jit
def _residual_mass(
    row,
    elders,
    weight,
    taken,
    links_ptr,
    numbers_ptr,
    logits_ptr,
    logits_stride,
    draft_logits_ptr,
    draft_logits_stride,
    draft_tokens_ptr,
    num_rows,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Sums of (weight p - taken q)+ and of q over the tokens that are no rejected child's."""
    top = tl.load(numbers_ptr + TARGET_MAX * num_rows + row)
    inverse = tl.load(numbers_ptr + TARGET_INV * num_rows + row)
    draft_top = tl.load(numbers_ptr + DRAFT_MAX * num_rows + row)
    draft_inverse = tl.load(numbers_ptr + DRAFT_INV * num_rows + row)
    target_row = logits_ptr + row.to(tl.int64) * logits_stride
    draft_row = draft_logits_ptr + row.to(tl.int64) * draft_logits_stride
    mass = tl.zeros((BLOCK,), tl.float32)
    tail = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, vocab_size, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        keep = tokens < vocab_size
        logits = tl.load(target_row + tokens, mask=keep, other=float("-inf")).to(tl.float32)
        drafts = tl.load(draft_row + tokens, mask=keep, other=float("-inf")).to(tl.float32)
        elder = tl.load(links_ptr + FIRST_CHILD * num_rows + row)
        for _ in range(elders):
            keep = keep & (tokens != tl.load(draft_tokens_ptr + elder))
            elder = tl.load(links_ptr + NEXT_SIBLING * num_rows + elder)
        prob = tl.exp(clean(logits) - top) * inverse
        draft_prob = tl.exp(clean(drafts) - draft_top) * draft_inverse
        mass += tl.where(keep, tl.maximum(weight * prob - taken * draft_prob, 0.0), 0.0)
        tail += tl.where(keep, draft_prob, 0.0)
    return tl.sum(mass, 0), tl.maximum(tl.sum(tail, 0), TINY)
