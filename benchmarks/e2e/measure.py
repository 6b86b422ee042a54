"""The rounds: every group of prompts goes through all methods before the next group.

The methods take turns of half a second, so that whatever disturbs the machine for longer hits all
of them alike. Their order rotates from group to group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.e2e.engine import Batch, Generated
from benchmarks.e2e.process import EngineProcess
from benchmarks.e2e.prompts import make_groups

WARMUP_TOKENS = 24
TURN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What to generate: prompts as token ids, and how."""

    prompt_ids: Sequence[Sequence[int]]
    batch_sizes: Sequence[int]
    max_tokens: int
    temperature: float
    repeats: int = 1
    per_place: int = 1

    def batch(self, group: Sequence[int], size: int, max_tokens: int | None = None) -> Batch:
        """These prompt indices, `size` at a time; a prompt's seed is its index."""
        return Batch(
            prompt_ids=[self.prompt_ids[i] for i in group],
            seeds=list(group),
            max_tokens=max_tokens or self.max_tokens,
            temperature=self.temperature,
            size=size,
        )


@dataclass(frozen=True, slots=True)
class Round:
    """One group of prompts at one batch size; `group` holds prompt indices."""

    batch_size: int
    repeat: int
    index: int
    group: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """One method's outcome in one round."""

    method: str
    round: Round
    generated: Generated

    @property
    def num_tokens(self) -> int:
        """New tokens of the whole batch."""
        return sum(map(len, self.generated.token_ids))

    @property
    def tokens_per_second(self) -> float:
        """Prefill and decoding together."""
        return self.num_tokens / self.generated.seconds


def make_rounds(plan: Plan) -> list[Round]:
    """All rounds, a batch size after the other."""
    return [
        Round(batch_size, repeat, index, group)
        for batch_size in plan.batch_sizes
        for repeat in range(plan.repeats)
        for index, group in enumerate(make_groups(len(plan.prompt_ids), batch_size, plan.per_place))
    ]


def rotated(labels: Sequence[str], index: int) -> list[str]:
    """`labels` starting with number `index`, cyclically."""
    first = index % len(labels)
    return [*labels[first:], *labels[:first]]


def warm_up(engines: Mapping[str, EngineProcess], plan: Plan) -> Iterator[None]:
    """A short batch of each size through every engine, which compiles some kernels on first use.

    Yields after each, `len(engines) * len(plan.batch_sizes)` times.
    """
    for batch_size in plan.batch_sizes:
        group = make_groups(len(plan.prompt_ids), batch_size)[-1]
        for engine in engines.values():
            engine.call(
                "generate", plan.batch(group, batch_size, min(WARMUP_TOKENS, plan.max_tokens))
            )
            yield


def measure(
    engines: Mapping[str, EngineProcess],
    plan: Plan,
    on_run: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run all rounds; `on_run` hears of each outcome."""
    runs: list[Run] = []
    for number, round_ in enumerate(make_rounds(plan)):
        for engine in engines.values():
            engine.call("begin", plan.batch(round_.group, round_.batch_size))
        done: dict[str, Run] = {}
        running = rotated(list(engines), number)
        while running:
            for label in tuple(running):
                generated = engines[label].call("advance", TURN_SECONDS)
                if generated is not None:
                    running.remove(label)
                    done[label] = Run(label, round_, generated)
                    on_run(done[label])
        runs += [done[label] for label in engines]
    return runs
