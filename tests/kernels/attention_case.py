"""Random tree-attention problems, and their answer from first principles in float64.

The answer knows parents, not ancestor words: it walks from each row to the root.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from specplus_kernels import tree_attention


def chain(rows: int) -> list[int]:
    return list(range(-1, rows - 1))


def star(rows: int) -> list[int]:
    return [-1] + [0] * (rows - 1)


def full(rows: int) -> list[int]:
    return [(row - 1) // 2 if row else -1 for row in range(rows)]


def random_tree(rows: int) -> list[int]:
    return [-1] + [int(torch.randint(row, ())) for row in range(1, rows)]


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of trees over a cache whose unused slots hold NaN."""

    parents: list[list[int]]  # per request and row, -1 for the root
    contexts: list[int]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 32
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    # vLLM on a CPU, without and with AMX; dense; vLLM's V2 runner
    layout: Literal["vec", "amx", "plain", "v2"] = "vec"
    skipped: list[int] | None = None  # per request, the first rows that are tail slots only
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **changes: Any) -> torch.Tensor:
        """The op's output; rows that it does not write are NaN."""
        out = torch.full_like(self.tensors["query"], torch.nan)
        given = {"scale": self.head_size**-0.5, "out": out, **self.tensors, **self.options}
        if self.layout == "amx":
            given["key_cache"] = amx_keys(given["key_cache"])
            given["value_cache"] = amx_values(given["value_cache"])
        return tree_attention(**{**given, **changes})

    def queries(self, req: int) -> range:
        """The rows of a request's tree that are query rows."""
        return range(self.skipped[req] if self.skipped else 0, len(self.parents[req]))

    def path(self, req: int, row: int) -> list[int]:
        """The rows from `row` up to the root of its request."""
        rows = []
        while row >= 0:
            rows.append(row)
            row = self.parents[req][row]
        return rows

    def slot(self, req: int, index: int) -> tuple[int, int]:
        """Block and offset of a logical slot."""
        block = self.tensors["block_table"][req, index // self.block_size]
        return int(block), index % self.block_size


def make_case(parents: list[list[int]], contexts: list[int], **fields: Any) -> Case:
    case = Case(parents, contexts, **fields)
    lens = torch.tensor([len(case.queries(req)) for req in range(len(parents))])
    tails = torch.tensor([len(rows) for rows in parents], dtype=torch.int32)
    start = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    slots = [context + len(rows) for context, rows in zip(contexts, parents, strict=True)]
    key_cache, value_cache, block_table = _caches(case, slots)
    mask = torch.zeros(int(start[-1]), max(1, -(-int(tails.max()) // 64)), dtype=torch.int64)
    tail_positions = torch.zeros(len(parents), max(1, int(tails.max())), dtype=torch.int64)
    positions = torch.zeros(len(mask), dtype=torch.int64)
    for req, rows in enumerate(parents):
        for row in range(len(rows)):
            tail_positions[req, row] = contexts[req] + len(case.path(req, row)) - 1
        for token, row in enumerate(case.queries(req), int(start[req])):
            for seen in case.path(req, row):
                bit = 1 << seen % 64
                mask[token, seen // 64] |= bit - (1 << 64 if bit >> 63 else 0)
            positions[token] = tail_positions[req, row]
    case.tensors.update(
        query=torch.randn(len(mask), case.num_heads, case.head_size).to(case.dtype),
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        query_start_loc=start,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        ancestor_mask=mask,
        positions=positions,
    )
    if case.skipped:
        case.tensors.update(tail_lens=tails, tail_positions=tail_positions)
    for req, count in enumerate(slots):
        index = torch.arange(count)
        at = (block_table[req, index // case.block_size].long(), index % case.block_size)
        for cache in (key_cache, value_cache):
            cache[at] = torch.randn(count, *cache.shape[2:]).to(cache.dtype)
    return case


def _caches(case: Case, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NaN caches in vLLM's CPU layout (or plain), and a shuffled block table."""
    max_blocks = max(1, -(-max(slots) // case.block_size))
    blocks = torch.randperm(len(slots) * max_blocks + 3)
    table = blocks[: len(slots) * max_blocks].view(-1, max_blocks).int()
    heads, size, dim = case.num_kv_heads, case.block_size, case.head_size
    dtype = case.cache_dtype or case.dtype
    if case.layout in ("plain", "amx"):
        caches = torch.full((2, len(blocks), size, heads, dim), torch.nan).to(dtype)
        return caches[0], caches[1], table
    memory = torch.full((len(blocks), heads, size, 2 * dim), torch.nan).to(dtype)
    if case.layout == "v2":
        keys, values = memory.transpose(1, 2).split(dim, dim=-1)
        return keys, values, table
    keys, values = memory.view(len(blocks), heads, 2 * size, dim).chunk(2, dim=2)
    keys = keys.view(len(blocks), heads, dim, size).permute(0, 3, 1, 2)
    return keys, values.transpose(1, 2), table


def amx_keys(cache: torch.Tensor) -> torch.Tensor:
    """Keys [num_blocks, block_size, num_kv_heads, head_size] as vLLM packs them for AMX."""
    pairs = cache.unflatten(3, (-1, 2)).unflatten(1, (-1, 16))
    return pairs.permute(0, 3, 1, 4, 2, 5).contiguous().permute(0, 2, 4, 1, 3, 5)


def amx_values(cache: torch.Tensor) -> torch.Tensor:
    """Values likewise."""
    pairs = cache.unflatten(3, (-1, 16)).unflatten(1, (-1, 2))
    return pairs.permute(0, 3, 4, 1, 5, 2).contiguous().permute(0, 3, 5, 1, 2, 4)


def dense_answer(case: Case) -> torch.Tensor:
    """[num_tokens, num_heads, head_size] float64, row by row."""
    tensors, start = case.tensors, case.tensors["query_start_loc"].tolist()
    window = case.options.get("sliding_window") or -1
    answer = torch.zeros_like(tensors["query"], dtype=torch.float64)
    for req in range(len(case.parents)):
        for out_row, row in enumerate(case.queries(req), start[req]):
            path, context = case.path(req, row), case.contexts[req]
            position = context + len(path) - 1
            at = {index: index for index in range(context)}  # slot -> position
            at |= {context + seen: position - up for up, seen in enumerate(path)}
            if window > 0:
                at = {slot: where for slot, where in at.items() if where > position - window}
            blocks, offsets = zip(*(case.slot(req, index) for index in at), strict=True)
            keys = tensors["key_cache"][list(blocks), list(offsets)].double()
            values = tensors["value_cache"][list(blocks), list(offsets)].double()
            keys, values = (
                keys * case.options.get("k_scale", 1),
                values * case.options.get("v_scale", 1),
            )
            query = tensors["query"][out_row].double()
            answer[out_row] = _attend_row(case, query, keys, values)
    return answer


def _attend_row(
    case: Case, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    group = case.num_heads // case.num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = (keys * query).sum(-1).T * case.head_size**-0.5  # [heads, slots]
    if cap := case.options.get("logits_soft_cap"):
        scores = cap * (scores / cap).tanh()
    weights = scores.exp()
    total = weights.sum(-1)
    if (sinks := case.options.get("sinks")) is not None:
        total = total + sinks.double().exp()
    return torch.einsum("hs,shd->hd", weights / total[:, None], values)
