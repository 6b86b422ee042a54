"""The stages of `vllm-specplus train`, one after the other; each goes on where it was left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from vllm_specplus import __version__
from vllm_specplus.proposers.heads.checkpoint import load_heads
from vllm_specplus.proposers.heads.eagle_checkpoint import load_eagle
from vllm_specplus.proposers.heads.files import Checkpoint
from vllm_specplus.proposers.heads.medusa_checkpoint import load_medusa
from vllm_specplus.train import report
from vllm_specplus.train.corpus import Corpus
from vllm_specplus.train.eagle import Eagle
from vllm_specplus.train.heads import Heads
from vllm_specplus.train.medusa import Medusa
from vllm_specplus.train.mtp3 import MTP3
from vllm_specplus.train.target import Writer
from vllm_specplus.train.teacher import Teacher
from vllm_specplus.train.text import Text, TextFile, read_prompts, split
from vllm_specplus.train.trainer import FitSettings, HeadsTrainer
from vllm_specplus.train.trainer import Progress as FitProgress


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What the command line says.

    kind: of heads, one of KINDS. text_tokens: what the target writes for training; held_out: share
    of the prompts' sources that is kept for measuring; start: path or id of heads to go on from;
    text_only: the first stage alone. tied, hidden_state_from, int8 are of MTP modules; heads,
    layers of Medusa's; depths of EAGLE's, whose draft_vocab is the loss's alone.
    """

    kind: str
    model: str
    prompts: Path
    out: Path
    fit: FitSettings
    text_tokens: int = 1_000_000
    prompt_tokens: int = 64
    new_tokens: int = 192
    held_out: float = 0.1
    chat: bool = False
    draft_vocab: int = 32_768
    tied: bool = True
    hidden_state_from: Literal["previous", "target"] = "previous"
    heads: int = 4
    layers: int = 1
    depths: int = 3
    start: str | None = None
    int8: bool = False
    text_only: bool = False
    device: str = "cpu"


def auto_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _mtp3(options: TrainOptions, teacher: Teacher, start: Any) -> Heads:
    hidden_state_from = options.hidden_state_from
    fields: dict[str, Any] = {"tied": options.tied, "int8": options.int8, "start": start}
    return MTP3(teacher, hidden_state_from=hidden_state_from, **fields)


def _medusa(options: TrainOptions, teacher: Teacher, start: Any) -> Heads:
    return Medusa(teacher, num_heads=options.heads, num_layers=options.layers, start=start)


def _eagle(options: TrainOptions, teacher: Teacher, start: Any) -> Heads:
    return Eagle(teacher, num_depths=options.depths, start=start)


KINDS: dict[str, tuple[Callable[[str], Checkpoint], Callable[..., Heads]]] = {
    "mtp3": (load_heads, _mtp3),
    "medusa": (load_medusa, _medusa),
    "eagle": (load_eagle, _eagle),
}
"""Kind of heads -> what loads those to go on from, and what makes them."""


def train(options: TrainOptions, console: Console) -> bool:
    """Runs all stages; False if it was stopped before the end. Raises SpecPlusError."""
    load, make = KINDS[options.kind]
    start = None if options.start is None else load(options.start)
    options.out.mkdir(parents=True, exist_ok=True)
    with _bars(console) as bars:
        text = _write_text(options, _bar(bars, "text", options.text_tokens))
        if options.text_only:
            return True
        dtype = getattr(torch, options.fit.compute)
        teacher = Teacher(options.model, torch.device(options.device), dtype)
        torch.manual_seed(options.fit.seed)
        heads = make(options, teacher, start)
        hidden = options.out / f"hidden-{text.digest()}.bf16"
        corpus = Corpus(text, hidden, teacher, heads.num_depths)
        corpus.compute(_bar(bars, "hidden states", len(text.tokens)))
        vocab = _draft_vocab(options, corpus, None if heads.drafts_all_tokens else start)
        trainer = HeadsTrainer(heads, corpus, vocab, options.fit, options.out / "state.pt")
        _fit(trainer, _bar(bars, "training", 1))
    if trainer.done() < 1:
        console.print(f"Stopped; the same command goes on from {trainer.file}.")
        return False
    _finish(options, trainer, heads, vocab, console)
    return True


OnProgress = Callable[..., None]
"""Takes what is done so far, and a note to show beside the bar."""


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, console=console)


def _bar(bars: Progress, name: str, total: float) -> OnProgress:
    task = bars.add_task(name, total=total, note="")

    def show(done: float, note: str = "") -> None:
        bars.update(task, completed=min(done, total), note=note)

    return show


def _write_text(options: TrainOptions, show: OnProgress) -> Text:
    """The target's own continuations: greedy ones to measure on, a mix to train on."""
    prompts, held_out = split(read_prompts(options.prompts), options.held_out)
    file = TextFile(options.out / "text.jsonl", options.model)

    def written(kept: bool) -> list[int]:
        return [len(s.token_ids) for s in file.samples if s.held_out is kept]

    if len(written(True)) < len(held_out) or sum(written(False)) < options.text_tokens:
        writer = Writer(
            options.model,
            options.prompt_tokens,
            options.new_tokens,
            chat=options.chat,
            seed=options.fit.seed + len(file.samples),
            dtype="float32" if options.fit.compute == "float32" else "auto",
        )
        with closing(writer):
            for samples in writer.held_out(held_out, len(written(True))):
                file.add(samples)
            for samples in writer.training(prompts, len(written(False))):
                file.add(samples)
                show(sum(written(False)))
                if sum(written(False)) >= options.text_tokens:
                    break
    show(options.text_tokens)
    return Text.of(file.samples)


def _draft_vocab(options: TrainOptions, corpus: Corpus, start: Checkpoint | None) -> Tensor | None:
    """That of the heads to go on from, else the tokens that the target writes most."""
    if start is not None:
        return start.draft_vocab
    counts = corpus.token_counts()
    if options.draft_vocab >= len(counts):
        return None
    return counts.argsort(descending=True, stable=True)[: options.draft_vocab]


def _fit(trainer: HeadsTrainer, show: OnProgress) -> None:
    """Trains; Ctrl-C ends it after the step that is running."""
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    def on_step(progress: FitProgress) -> bool:
        show(trainer.done(), _note(progress))
        return interrupted

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        trainer.run(on_step)
    finally:
        signal.signal(signal.SIGINT, before)


def _note(progress: FitProgress) -> str:
    """Loss, and the last held-out acceptance: per depth top 1 / 2 / 4."""
    tops = zip(*progress.evaluations[-1][1], strict=True)
    depths = "  ".join("/".join(f"{share:.2f}" for share in depth) for depth in tops)
    return f"loss {progress.loss:.3f}  held out {depths}"


def _finish(
    options: TrainOptions,
    trainer: HeadsTrainer,
    heads: Heads,
    vocab: Tensor | None,
    console: Console,
) -> None:
    """Measures on all held-out text, writes heads and report, and says how to serve them."""
    ranks, progress = trainer.evaluate(), trainer.progress
    about = {
        "trainer": f"vllm_specplus {__version__} train {options.kind}",
        "target": options.model,
        "started_from": options.start,
        "device": options.device,
        "text_tokens": len(trainer.corpus.text.tokens),
        "token_passes": progress.tokens,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 2),
        **trainer.settings.identity(),
    }
    heads.save(options.out, vocab, about)
    header, *rows = report.write(options.out, ranks, progress, about)
    table = Table(*header, title="held-out acceptance: top 1 / 2 / 4, and drafts accepted a round")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Report: {options.out / 'report.md'}. Serve the heads with", highlight=False)
    serve = f'vllm serve {options.model} --speculative-model "[{options.kind}]{options.out}"'
    serve = f"{serve} --num-speculative-tokens {heads.num_depths}"
    console.print(f"  {serve}", highlight=False, markup=False)
