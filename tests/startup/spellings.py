"""One tree in the three spellings of our options."""

from __future__ import annotations

import json
from typing import Any

from vllm import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

TREE = {
    "speculative_model": "[ngram]",
    "num_speculative_tokens": 5,
    "speculative_tree": "dynamic:12",
    "ngram_prompt_lookup_max": 4,
}
TREE_KEYS = {
    "method": "ngram",
    "num_speculative_tokens": 5,
    "tree": "dynamic:12",
    "prompt_lookup_max": 4,
}


def by_keywords(model: str, **arguments: Any) -> EngineArgs:
    return EngineArgs(model=model, skip_tokenizer_init=True, **arguments)


def by_flags(model: str, **arguments: Any) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = [f"--model={model}", "--skip-tokenizer-init"]
    for name, value in arguments.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        flags += ["--" + name.replace("_", "-"), text]
    return AsyncEngineArgs.from_cli_args(parser.parse_args(flags))


def outcome(arguments: EngineArgs) -> tuple[Any, Any, Any]:
    return arguments.speculative_config, arguments.additional_config, arguments.worker_cls
