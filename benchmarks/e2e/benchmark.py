"""One benchmark from options to results; `generate` and `demo` differ in their options only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks.e2e.engine import EngineSettings
from benchmarks.e2e.equality import Equality, compare
from benchmarks.e2e.measure import Plan, Run, make_rounds, measure, warm_up
from benchmarks.e2e.methods import PLAIN, Method
from benchmarks.e2e.process import EngineProcess, running_engines
from benchmarks.e2e.prompts import Prompt, make_groups
from benchmarks.e2e.summary import Row, summarize

MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. Prompts are cut so that with `max_tokens` they fit into `max_model_len`."""

    model: Path
    prompts: Sequence[Prompt]
    methods: Sequence[Method]
    batch_sizes: Sequence[int] = (1,)
    max_tokens: int = 128
    temperature: float = 0.0
    repeats: int = 1
    per_place: int = 1
    dtype: str = "auto"
    max_model_len: int = 2048
    enforce_eager: bool = False
    kv_cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        """Raise ValueError for options that contradict each other."""
        if not 0 < self.max_tokens < self.max_model_len:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be from 1 to max_model_len - 1 = "
                f"{self.max_model_len - 1}; raise --max-model-len"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        for batch_size in self.batch_sizes:
            make_groups(len(self.prompts), batch_size, self.per_place)

    @property
    def engine_settings(self) -> EngineSettings:
        """Settings of every engine of this run."""
        return EngineSettings(
            model=str(self.model),
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=max(self.batch_sizes),
            enforce_eager=self.enforce_eager,
            kv_cache_bytes=self.kv_cache_bytes,
            memory_share=MEMORY_SHARE / len(self.methods),
        )


@dataclass(frozen=True, slots=True)
class Result:
    """All that a report needs."""

    options: Options
    dtype: str
    runs: Sequence[Run]
    rows: Sequence[Row]
    equalities: Sequence[Equality]
    startup_seconds: Mapping[str, float]


def run_benchmark(options: Options, console: Console) -> Result:
    """Start the engines, warm up, measure, compare; the engines end in any case."""
    startup_seconds: dict[str, float] = {}
    with _progress(console) as progress:
        task = progress.add_task("starting engines", total=len(options.methods))

        def on_ready(method: Method, seconds: float) -> None:
            startup_seconds[method.label] = seconds
            progress.advance(task)

        with running_engines(options.methods, options.engine_settings, on_ready) as engines:
            plan = _make_plan(options, engines[PLAIN])
            runs = _run_all(engines, plan, progress)
            return Result(
                options,
                dtype=engines[PLAIN].call("dtype"),
                runs=runs,
                rows=summarize(runs),
                equalities=_compare(runs, plan, engines[PLAIN], progress),
                startup_seconds=startup_seconds,
            )


def _make_plan(options: Options, plain: EngineProcess) -> Plan:
    texts = [prompt.text for prompt in options.prompts]
    return Plan(
        prompt_ids=plain.call("encode", texts, options.max_model_len - options.max_tokens),
        batch_sizes=options.batch_sizes,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        repeats=options.repeats,
        per_place=options.per_place,
    )


def _run_all(engines: Mapping[str, EngineProcess], plan: Plan, progress: Progress) -> list[Run]:
    num_warm_ups = len(engines) * len(plan.batch_sizes)
    for _ in progress.track(warm_up(engines, plan), num_warm_ups, description="warming up"):
        pass
    task = progress.add_task("generating", total=len(engines) * len(make_rounds(plan)))
    return measure(engines, plan, lambda run: progress.advance(task))


def _compare(
    runs: Sequence[Run], plan: Plan, plain: EngineProcess, progress: Progress
) -> list[Equality]:
    task = progress.add_task("comparing texts", total=None)

    def top_logits(prompt_ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        progress.advance(task)
        return plain.call("top_logits", prompt_ids, count)

    equalities = compare(runs, plan, plain.call("dtype"), top_logits)
    progress.update(task, total=progress.tasks[task].completed)
    return equalities


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
