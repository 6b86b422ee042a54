"""What a drafter of V2 keeps in its KV cache, and paths that its chain never had."""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from specplus_kernels.tiled import vec_kv_views
from specplus_kernels.tree_grow.rows import TreeRows, empty_rows
from vllm import SamplingParams

from tests.engine.engines import Engine, Request
from tests.engine.models import TINY_VOCAB_SIZE
from vllm_specplus.engine import v2_speculator

Kept = dict[tuple[int, ...], list[torch.Tensor]]
"""Committed tokens -> per level of the drafter, keys and values of the rows that are final."""


@contextmanager
def keeping(run_by: Engine) -> Iterator[Kept]:
    """Notes what the drafter has in its cache after every draft, but for prompts that go on.

    The row of level k (from 1 on) at position p saw token p + k: it is final once that is there.
    """
    core = run_by.llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    layers = runner.vllm_config.compilation_config.static_forward_context
    groups = enumerate(runner.kv_cache_config.kv_cache_groups)
    group_of = {name: index for index, group in groups for name in group.layer_names}
    names = sorted(
        runner.speculator.draft_attn_layer_names,
        key=lambda name: [int(part) for part in name.split(".") if part.isdigit()],
    )
    kept: Kept = {}
    propose = runner.speculator.propose

    def rows(name: str, index: int, end: int) -> torch.Tensor:
        table = runner.block_tables.input_block_tables[group_of[name]][index]
        parts, at = vec_kv_views(layers[name].kv_cache), torch.arange(max(end, 0))
        size = parts[0].shape[1]
        return torch.stack([part[table[at // size].long(), at % size] for part in parts])

    def noted(batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        drafted = propose(batch, *args, **kwargs)
        states, ends = runner.req_states, batch.num_computed_tokens_np + batch.num_scheduled_tokens
        for index, slot in enumerate(batch.idx_mapping.tolist()):
            if ends[index] < batch.prefill_len_np[index]:
                continue
            length = int(states.total_len.gpu[slot])
            tokens = states.all_token_ids.gpu[slot, :length].tolist()
            kept[tuple(tokens)] = [
                rows(name, index, length - level) for level, name in enumerate(names, 1)
            ]
        return drafted

    with mock.patch.object(runner.speculator, "propose", noted):
        yield kept


@contextmanager
def branches(texts: Sequence[Sequence[int]], depth: int) -> Iterator[None]:
    """Has the n-gram side of a tree propose what `texts` go on with; of `depth` tokens 0 to
    `depth` are right."""

    def match(tokens: torch.Tensor, lens: torch.Tensor, slots: torch.Tensor, **_: Any) -> TreeRows:
        nodes = []
        for slot in slots.tolist():
            known = tokens[slot, : lens[slot]].tolist()
            rest = next((t for t in texts if t[: len(known)] == known), [])[len(known) :]
            right = len(known) % (depth + 1)
            branch = [t if i < right else (t + 1) % TINY_VOCAB_SIZE for i, t in enumerate(rest)]
            nodes.append([-1, *branch[:depth], *[-1] * (depth - len(rest))])
        rows = torch.arange(depth + 1).expand(len(nodes), -1)
        grown = torch.tensor(nodes)
        chains = empty_rows(len(nodes), depth, grown.device)
        parents, depths = (part.where(grown >= 0, 0) for part in (rows - 1, rows))
        return chains._replace(tokens=grown, parents=parents, depths=depths)

    with mock.patch.object(v2_speculator, "ngram_match", match):
        yield


def as_prompts_leave_it(run_by: Engine, kept: Kept, num_levels: int | None = None) -> None:
    """What was kept of each path is what a prompt of its tokens leaves."""
    paths, last = dict(kept), SamplingParams(temperature=0, max_tokens=1)
    for tokens, levels in paths.items():
        kept.clear()
        run_by.run([Request(tokens[:-1], last)])
        for rows in zip(levels[:num_levels], kept[tokens][:num_levels], strict=True):
            torch.testing.assert_close(*rows, atol=1e-4, rtol=0)
