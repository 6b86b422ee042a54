"""The command `vllm-specplus`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_specplus.errors import SpecPlusError, bad_option

main = typer.Typer(add_completion=False, no_args_is_help=True)
train = typer.Typer(no_args_is_help=True, help="Trains draft heads for a model.")
main.add_typer(train, name="train")


@main.callback()
def _root() -> None:
    """Speculative decoding for stock vLLM."""


@main.command()
def check(
    model: Annotated[
        str | None, typer.Option(help="Say what token trees refuse for this model, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Says whether token trees can run here, and why not; exits with 0 or 1."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with contextlib.redirect_stdout(sys.stderr):
        from vllm_specplus.startup.report import collect

        found = collect(model)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    raise typer.Exit(0 if found["ok"] else 1)


Model = Annotated[str, typer.Option(help="The target: a path or an id on the hub.")]
Prompts = Annotated[Path, typer.Option(help="A .jsonl or text file, or a folder of them.")]
Out = Annotated[Path, typer.Option(help="Folder for everything; a run in it goes on.")]
Minutes = Annotated[float, typer.Option(min=0.01, help="Time of training at most.")]
Tokens = Annotated[float, typer.Option(min=1, help="Token passes at most.")]
TextTokens = Annotated[int, typer.Option(min=1, help="What the target writes.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Length of prompts at most.")]
NewTokens = Annotated[int, typer.Option(min=8, help="Length of continuations at most.")]
Chat = Annotated[bool, typer.Option(help="Put prompts into the model's chat template.")]
TextOnly = Annotated[bool, typer.Option(help="End when the text is written.")]
DraftVocab = Annotated[int, typer.Option(min=1, help="Tokens that can be drafted.")]
Start = Annotated[str | None, typer.Option(help="Heads to go on from.")]
FP32 = Annotated[
    bool,
    typer.Option(help="Write text and compute in float32: faster on CPUs without AVX-512."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples of a step.")]
LearningRate = Annotated[float, typer.Option(min=0, help="At its highest.")]
HeadRows = Annotated[int, typer.Option(min=1, help="Rows of the head in the loss.")]
Seed = Annotated[int, typer.Option(help="Of text, order and sampled rows.")]


@main.command()
def tune(
    model: Model,
    method: Annotated[str, typer.Option(help="What drafts: '[ngram]', '[mtp3]HEADS', ...")],
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="For 'tuned:FILE'.")] = Path("specplus-tuned.json"),
    depth: Annotated[int, typer.Option(min=1, max=127, help="Depth of drafts at most.")] = 6,
    nodes: Annotated[int, typer.Option(min=1, max=127, help="Nodes of a tree at most.")] = 48,
    temperature: Annotated[float, typer.Option(min=0, help="Of what is decoded.")] = 0.0,
    new_tokens: Annotated[int, typer.Option(min=8, help="After prompts; long ones are cut.")] = 64,
    limit: Annotated[int, typer.Option(min=1, help="Prompts at most, spread evenly.")] = 40,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="As vLLM's.")] = None,
    eager: Annotated[bool, typer.Option(help="Do not compile the model.")] = False,
) -> None:
    """Measures acceptance and the cost of rows, and says which trees are best; writes OUT."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_specplus.startup.tune import TuneOptions
    from vllm_specplus.startup.tune import tune as measure
    from vllm_specplus.train.text import read_prompts

    options = TuneOptions(
        model=model,
        speculative_model=method if "[" in method or "/" in method else f"[{method}]",
        num_speculative_tokens=depth,
        num_nodes=nodes,
        new_tokens=new_tokens,
        temperature=temperature,
        engine={"max_num_seqs": 8, "max_model_len": max_model_len, "enforce_eager": eager},
    )
    with _one_line():
        if not out.resolve().parent.is_dir():
            raise bad_option("out", str(out), "is in a folder that does not exist", "make it first")
        texts = [prompt.text for prompt in read_prompts(prompts)]
        tuned = measure(options, texts[:: -(-len(texts) // limit)])
    out.write_text(tuned.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console, best = (
        Console(markup=False),
        Table("batch", "speculative_tree", "accepted", "expected speed"),
    )
    best.title = f"{tuned.speculative_model}, num_speculative_tokens={depth}"
    for batch_size, found in tuned.recommended.items():
        tree = found.speculative_tree or "none: drafts do not pay"
        best.add_row(f"{batch_size}", tree, f"{found.num_accepted:.2f}", f"{found.speedup:.2f}x")
    console.print(best)
    console.print(f"Use it with --speculative-tree tuned:{out}", highlight=False)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What the user can mend ends in one line and exit code 2; a command that is told to end
    (SIGTERM) does so as by Ctrl-C, with its engine."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except SpecPlusError as error:
        console = Console(stderr=True, markup=False, highlight=False)
        console.print(f"Error: {error}", soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does, also where a shell started the command in the background and ignores it."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(number, frame)


@train.command()
def mtp3(
    model: Model,
    prompts: Prompts,
    out: Out,
    minutes: Minutes = 30.0,
    tokens: Tokens = math.inf,
    text_tokens: TextTokens = 1_000_000,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 192,
    chat: Chat = False,
    text_only: TextOnly = False,
    draft_vocab: DraftVocab = 32_768,
    tied: Annotated[bool, typer.Option(help="One set of weights at all depths.")] = True,
    start: Start = None,
    int8: Annotated[bool, typer.Option(help="Write the layers' matrices as int8.")] = False,
    fp32: FP32 = False,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = 3e-4,
    head_rows: HeadRows = 8192,
    seed: Seed = 0,
) -> None:
    """Trains three multi-token-prediction modules; writes heads, state and a report to OUT."""
    _train("mtp3", locals())


@train.command()
def medusa(
    model: Model,
    prompts: Prompts,
    out: Out,
    heads: Annotated[int, typer.Option(min=1, help="How many tokens are drafted.")] = 4,
    layers: Annotated[int, typer.Option(min=1, help="Residual blocks of each head.")] = 1,
    minutes: Minutes = 30.0,
    tokens: Tokens = math.inf,
    text_tokens: TextTokens = 1_000_000,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 192,
    chat: Chat = False,
    text_only: TextOnly = False,
    draft_vocab: DraftVocab = 32_768,
    start: Start = None,
    fp32: FP32 = False,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = 1e-3,
    head_rows: HeadRows = 8192,
    seed: Seed = 0,
) -> None:
    """Trains Medusa heads; writes heads, state and a report to OUT."""
    _train("medusa", locals())


@train.command()
def eagle(
    model: Model,
    prompts: Prompts,
    out: Out,
    depths: Annotated[int, typer.Option(min=1, help="Steps that training unrolls.")] = 3,
    minutes: Minutes = 30.0,
    tokens: Tokens = math.inf,
    text_tokens: TextTokens = 1_000_000,
    prompt_tokens: PromptTokens = 64,
    new_tokens: NewTokens = 192,
    chat: Chat = False,
    text_only: TextOnly = False,
    draft_vocab: Annotated[int, typer.Option(min=1, help="Tokens in the loss.")] = 32_768,
    start: Start = None,
    fp32: FP32 = False,
    batch_size: BatchSize = 8,
    learning_rate: LearningRate = 3e-4,
    head_rows: HeadRows = 8192,
    seed: Seed = 0,
) -> None:
    """Trains an EAGLE head; writes it, state and a report to OUT."""
    _train("eagle", locals())


def _train(kind: str, given: dict[str, Any]) -> None:
    """given: what the command line says, by the names of the parameters."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_specplus.startup.host import engine_config
    from vllm_specplus.train import command

    fit = command.FitSettings(
        compute="float32" if given.pop("fp32") else "bfloat16",
        max_tokens=given.pop("tokens"),
        max_seconds=60 * given.pop("minutes"),
        **{name: given.pop(name) for name in ("seed", "learning_rate", "batch_size", "head_rows")},
    )
    options = command.TrainOptions(kind=kind, fit=fit, device=command.auto_device(), **given)
    with _one_line():
        length = options.prompt_tokens + options.new_tokens
        engine_config(options.model, max_model_len=length)  # or an error, before anything is made
        raise typer.Exit(0 if command.train(options, Console()) else 130)


def _show(found: dict[str, Any]) -> None:
    console = Console(markup=False)
    about = Table(show_header=False, title="vllm-specplus")
    for section in ("versions", "machine"):
        for name, value in found[section].items():
            about.add_row(name.replace("_", " "), _text(value))
        about.add_section()
    about.add_row("tree engine", _text(found["engine"]["name"]))
    about.add_row("why", found["engine"]["why"])
    if found["model"] is not None:
        about.add_row("model", found["model"]["name"])
        about.add_row("refused", "\n".join(found["model"]["refused"]) or "nothing")
    console.print(about)
    for title in ("hooks", "hooks of the other engine"):
        hooks = Table("vLLM name", "found", title=title)
        for hook in found[title]:
            missing = hook["missing"]
            hooks.add_row(hook["name"], missing or "yes", style="red" if missing else None)
        console.print(hooks)
    verdict = "can" if found["ok"] else "cannot"
    console.print(f"Token trees {verdict} run here; chains of vLLM's own methods always can.")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value or "none")
