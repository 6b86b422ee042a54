"""The command `vllm-specplus`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

main = typer.Typer(add_completion=False, no_args_is_help=True)


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
    hooks = Table("vLLM name", "found", title="hooks")
    for hook in found["hooks"]:
        missing = hook["missing"]
        hooks.add_row(hook["name"], missing or "yes", style="red" if missing else None)
    console.print(hooks)
    verdict = "can" if found["ok"] else "cannot"
    console.print(f"Token trees {verdict} run here; chains of vLLM's own methods always can.")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) or "none" if isinstance(value, list) else str(value or "none")
