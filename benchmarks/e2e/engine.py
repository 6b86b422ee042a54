"""One vLLM engine of the benchmark: what runs inside an engine's process.

vLLM is imported here only, inside `Engine`, so that the process that drives and draws stays light.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any

from benchmarks.e2e.methods import Method


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings that are the same for every method of a run."""

    model: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    enforce_eager: bool
    kv_cache_bytes: int
    memory_share: float
    """Fraction of the device's memory that one engine may claim."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts as token ids, and one sampling seed for each; `size` of them run at a time."""

    prompt_ids: Sequence[Sequence[int]]
    seeds: Sequence[int]
    max_tokens: int
    temperature: float
    size: int


@dataclass(frozen=True, slots=True)
class Counters:
    """Of vLLM: steps, and of speculative decoding drafts (trees) and tokens. One is ours."""

    steps: int
    """Of the engine, over whatever batch it had."""
    decode_steps: int
    """Of requests, those steps that gave tokens after a request's first."""
    drafts: int
    drafted: int
    accepted: int
    accepted_per_depth: tuple[int, ...]
    draft_seconds: float | None
    """In which drafts were made; None for vLLM's own drafters, which nobody times."""

    def since(self, earlier: Counters) -> Counters:
        """What has been counted since `earlier`."""
        before = earlier.accepted_per_depth or (0,) * len(self.accepted_per_depth)
        per_depth = zip(self.accepted_per_depth, before, strict=True)
        return Counters(
            self.steps - earlier.steps,
            self.decode_steps - earlier.decode_steps,
            self.drafts - earlier.drafts,
            self.drafted - earlier.drafted,
            self.accepted - earlier.accepted,
            tuple(now - then for now, then in per_depth),
            None
            if self.draft_seconds is None or earlier.draft_seconds is None
            else self.draft_seconds - earlier.draft_seconds,
        )


@dataclass(frozen=True, slots=True)
class Generated:
    """Outcome of one batch: wall time in seconds, new tokens of each prompt, counters."""

    seconds: float
    token_ids: tuple[tuple[int, ...], ...]
    counters: Counters


class Engine:
    """A stock `vllm.LLM` for one method; requests are batches of token ids."""

    def __init__(self, method: Method, settings: EngineSettings) -> None:
        if method.uses_plugin:
            import vllm_specplus  # noqa: F401  (arms the options without an entry point too)
        from vllm import LLM

        self.llm = LLM(
            model=settings.model,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            # No prompt in chunks: in vLLM 0.32 those of seeded requests raise on CPUs.
            max_num_batched_tokens=settings.max_num_seqs * settings.max_model_len,
            enforce_eager=settings.enforce_eager,
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            gpu_memory_utilization=settings.memory_share,
            logprobs_mode="raw_logits",
            disable_log_stats=False,
            seed=0,
            **method.engine_kwargs,
        )

    def dtype(self) -> str:
        """The model's dtype, such as `bfloat16`."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def encode(self, texts: Sequence[str], max_len: int) -> list[list[int]]:
        """Token ids of plain texts, at most `max_len` each, with one BOS if the model has one."""
        tokenizer = self.llm.get_tokenizer()
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        return [(bos + list(prompt))[:max_len] for prompt in ids]

    def generate(self, batch: Batch) -> Generated:
        """Generate exactly `max_tokens` tokens for every prompt, from a cold prefix cache."""
        self.begin(batch)
        generated = self.advance(inf)
        assert generated is not None, "a batch without an end"
        return generated

    def begin(self, batch: Batch) -> None:
        """Make ready to `generate` a batch in turns."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=batch.temperature,
                seed=seed,
                max_tokens=batch.max_tokens,
                ignore_eos=True,
            )
            for seed in batch.seeds
        ]
        self.llm.reset_prefix_cache()
        self._before, self._seconds = self._counters(), 0.0
        self._steps = self._run(batch, params)

    def advance(self, seconds: float) -> Generated | None:
        """Work on the batch for about so many seconds; None if it has not come to its end.

        Only the time in here counts: others may work between two turns.
        """
        start = now = time.perf_counter()
        token_ids = None
        while token_ids is None and now - start < seconds:
            token_ids, now = next(self._steps), time.perf_counter()
        self._seconds += now - start
        if token_ids is None:
            return None
        return Generated(self._seconds, token_ids, self._counters().since(self._before))

    def _run(
        self, batch: Batch, params: Sequence[Any]
    ) -> Iterator[tuple[tuple[int, ...], ...] | None]:
        """A step a time; the last gives the new tokens of each prompt. Where one prompt's text
        ends the next begins."""
        engine = self.llm.llm_engine
        waiting, running = iter(zip(batch.prompt_ids, params, strict=True)), 0
        done: dict[int, tuple[int, ...]] = {}
        while len(done) < len(params):
            for prompt_ids, settings in islice(waiting, batch.size - running):
                prompt: Any = {"prompt_token_ids": list(prompt_ids)}
                engine.add_request(str(len(done) + running), prompt, settings)
                running += 1
            for output in engine.step():
                if output.finished:
                    done[int(output.request_id)] = tuple(output.outputs[0].token_ids)
                    running -= 1
            whole = len(done) == len(params)
            yield tuple(done[index] for index in range(len(params))) if whole else None

    def top_logits(self, prompt_ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """The `count` largest logits after `prompt_ids` as (token id, logit), largest first."""
        from vllm import SamplingParams

        prompt: Any = {"prompt_token_ids": list(prompt_ids)}
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=count)
        (output,) = self.llm.generate([prompt], params, use_tqdm=False)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None, "asked for logprobs, got none"
        ranked = sorted(logprobs[0].items(), key=lambda item: -item[1].logprob)
        return [(int(token), float(entry.logprob)) for token, entry in ranked[:count]]

    def _counters(self) -> Counters:
        metrics = {metric.name: metric for metric in self.llm.get_metrics()}

        def read(name: str, attribute: str = "value", default: Any = 0) -> Any:
            return getattr(metrics.get(name), attribute, default)

        return Counters(
            steps=read("vllm:iteration_tokens_total", "count"),
            decode_steps=read("vllm:inter_token_latency_seconds", "count"),
            drafts=read("vllm:spec_decode_num_drafts"),
            drafted=read("vllm:spec_decode_num_draft_tokens"),
            accepted=read("vllm:spec_decode_num_accepted_tokens"),
            accepted_per_depth=tuple(
                read("vllm:spec_decode_num_accepted_tokens_per_pos", "values", ())
            ),
            draft_seconds=read("vllm_specplus:draft_seconds", default=None),
        )
