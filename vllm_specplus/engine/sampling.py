"""The target's token at every row of a step, drawn by vLLM's own sampler.

A tree row is sampled as if it were a request of its own whose history ends with the row's
ancestors. So temperature, top-k, top-p, min-p, penalties, logit bias, bad words, min_tokens,
allowed tokens, logprobs and seeds mean on trees what they mean without speculation.

Seeds: vLLM draws once per emitted token from a request's generator. A row at depth d uses the draw
that the plain stream would use d tokens later, and afterwards the generator has advanced by the
number of tokens emitted: seeded output equals plain decoding token for token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import torch
from specplus_kernels.row_argmax import row_argmax
from specplus_kernels.row_gumbel_argmax import row_gumbel_argmax

from vllm_specplus.core.tree import Tree
from vllm_specplus.engine.compat import (
    LogprobsTensors,
    SamplingParams,
    init_logger,
)
from vllm_specplus.engine.compat_cpu import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    Sampler,
    SamplingMetadata,
    draw_seed,
    fused_gumbel_argmax,
)

logger = init_logger(__name__)


@dataclass(frozen=True, slots=True)
class RowSource:
    """What the rows of one request inherit; the token lists are the host's own, growing ones."""

    params: SamplingParams
    prompt_token_ids: list[int] | None
    output_token_ids: list[int]
    tree: Tree


@dataclass(frozen=True, slots=True)
class Stream:
    """What a request's generator yields from here on.

    states: after 0, 1, ... draws; seeds: the draws themselves, one per depth.
    """

    states: list[torch.Tensor]
    seeds: list[int]

    @classmethod
    def of(cls, generator: torch.Generator, depth: int) -> Stream:
        """The draws for depths 0 to `depth`; the generator is left where it was."""
        states, seeds = [generator.get_state()], []
        for _ in range(depth + 1):
            seeds.append(draw_seed(generator))
            states.append(generator.get_state())
        generator.set_state(states[0])
        return cls(states, seeds)

    def generator(self, depth: int) -> torch.Generator:
        """A generator that yields the draws from `depth` on."""
        generator = torch.Generator()
        generator.set_state(self.states[depth])
        return generator


@dataclass(frozen=True, slots=True)
class RowSamples:
    """tokens: int64 [num_logits_rows]. logprobs: per row, or None. streams: by request index.

    way: how the rows were drawn, as their cost depends on it.
    """

    tokens: torch.Tensor
    logprobs: LogprobsTensors | None
    streams: dict[int, Stream]
    way: Literal["argmax", "gumbel", "sampler"]

    def advance(self, generators: dict[int, torch.Generator], num_emitted: Sequence[int]) -> None:
        """Leaves each request's generator where plain decoding would: after its emitted tokens."""
        for index, stream in self.streams.items():
            generators[index].set_state(stream.states[num_emitted[index]])


def sample_rows(
    sampler: Sampler,
    logits: torch.Tensor,
    metadata: SamplingMetadata,
    sources: Sequence[RowSource],
) -> RowSamples:
    """Draws one token per row.

    Args:
        logits: [num_logits_rows, vocab_size], the rows of each request in tree order.
        metadata: vLLM's metadata per request.
        sources: one per request.
    """
    depths = [source.tree.depths() for source in sources]
    streams = {
        index: Stream.of(generator, max(depths[index]))
        for index, generator in metadata.generators.items()
    }
    plain = is_plain(metadata, sources)
    if plain and metadata.all_greedy:
        return RowSamples(row_argmax(logits), None, streams, "argmax")
    rows = _Rows([i for i, d in enumerate(depths) for _ in d], [d for ds in depths for d in ds])
    if plain and draws_like_vllm():
        seeds = [
            streams[owner].seeds[depth] if owner in streams else 0
            for owner, depth in zip(rows.owners, rows.depths, strict=True)
        ]
        temperature = metadata.temperature[rows.index]
        tokens = row_gumbel_argmax(logits, temperature, torch.tensor(seeds))
        return RowSamples(tokens, None, streams, "gumbel")
    output = sampler(logits=logits, sampling_metadata=_per_row(metadata, sources, rows, streams))
    tokens = output.sampled_token_ids.flatten().long()
    return RowSamples(tokens, output.logprobs_tensors, streams, "sampler")


@cache
def draws_like_vllm() -> bool:
    """Whether the fused sampling kernel draws the tokens that this vLLM's own kernel draws."""
    logits = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    temperature, seeds = torch.full((16,), 0.7), torch.arange(16)
    theirs = fused_gumbel_argmax(logits / temperature[:, None], seeds)
    same = theirs is not None and row_gumbel_argmax(logits, temperature, seeds).equal(theirs)
    if not same:
        logger.warning("This vLLM draws noise differently: its own, slower sampler is used.")
    return same


def is_plain(metadata: SamplingMetadata, sources: Sequence[RowSource]) -> bool:
    """Whether temperature and seed are all that the requests ask for."""
    return (
        metadata.no_penalties
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not _tracks_thinking(metadata)
        and not any(_needs_processors(source.params) for source in sources)
    )


def _needs_processors(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.min_tokens or params.min_p)


def _tracks_thinking(metadata: SamplingMetadata) -> bool:
    """Whether a request of the batch has a thinking budget."""
    holder = metadata.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Request index and depth of every row."""

    owners: list[int]
    depths: list[int]

    @property
    def index(self) -> torch.Tensor:
        return torch.tensor(self.owners)


def _per_row(
    metadata: SamplingMetadata,
    sources: Sequence[RowSource],
    rows: _Rows,
    streams: dict[int, Stream],
) -> SamplingMetadata:
    """The metadata of a batch in which every row is a request."""
    owners, index = rows.owners, rows.index
    processed = any(_needs_processors(source.params) for source in sources)
    with_history = processed or metadata.bad_words_token_ids or not metadata.no_penalties
    history = [h for source in sources for h in _histories(source)] if with_history else []

    def take(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[index]

    def by_row(values: dict[int, Any] | None) -> dict[int, Any]:
        values = values or {}
        return {row: values[owner] for row, owner in enumerate(owners) if owner in values}

    return replace(
        metadata,
        temperature=take(metadata.temperature),
        top_p=take(metadata.top_p),
        top_k=take(metadata.top_k),
        generators={
            row: streams[owner].generator(depth)
            for row, (owner, depth) in enumerate(zip(owners, rows.depths, strict=True))
            if owner in streams
        },
        prompt_token_ids=take(metadata.prompt_token_ids),
        frequency_penalties=take(metadata.frequency_penalties),
        presence_penalties=take(metadata.presence_penalties),
        repetition_penalties=take(metadata.repetition_penalties),
        output_token_ids=history,
        allowed_token_ids_mask=take(metadata.allowed_token_ids_mask),
        bad_words_token_ids=by_row(metadata.bad_words_token_ids),
        logitsprocs=_processors(sources, owners, history) if processed else LogitsProcessors(),
        logprob_token_ids=by_row(metadata.logprob_token_ids) or None,
        spec_token_ids=None,
        thinking_budget_state_holder=_RootRows(metadata, rows.depths)
        if _tracks_thinking(metadata)
        else None,
    )


def _histories(source: RowSource) -> list[list[int]]:
    """Output tokens before each row's draw: the request's own, then the row's ancestors."""
    histories = [source.output_token_ids]
    for token, parent in zip(source.tree.tokens, source.tree.parents, strict=True):
        histories.append([*histories[parent], token])
    return histories


def _processors(
    sources: Sequence[RowSource], owners: Sequence[int], history: Sequence[list[int]]
) -> LogitsProcessors:
    """vLLM's built-in logits processors, told that every row is a request."""
    device = torch.device("cpu")
    rows = len(owners)
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows))
    added = [
        (row, sources[owner].params, sources[owner].prompt_token_ids, history[row])
        for row, owner in enumerate(owners)
    ]
    update = BatchUpdate(batch_size=rows, removed=[], added=added, moved=[])
    processors = [
        kind(config, device, False)
        for kind in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor)
    ]
    for processor in processors:
        processor.update_state(update)
    return LogitsProcessors(processors)


class _RootRows:
    """vLLM's thinking budget, applied to root rows: its requests are not drafted for."""

    def __init__(self, metadata: SamplingMetadata, depths: Sequence[int]) -> None:
        self._holder = metadata.thinking_budget_state_holder
        self._holder.in_spec_mode = False
        self._output_token_ids = metadata.output_token_ids
        self._roots = [row for row, depth in enumerate(depths) if depth == 0]

    def has_tracked_requests(self) -> bool:
        return True

    def update_state(self, *_: Any, **__: Any) -> None:
        self._holder.update_state(self._output_token_ids, None)

    def apply_to_logits(self, logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        logits[self._roots] = self._holder.apply_to_logits(logits[self._roots], False, None)
        return logits
