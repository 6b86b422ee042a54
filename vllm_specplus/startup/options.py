"""Our options, in all three spellings, turned into arguments of vLLM's own EngineArgs.

Keyword arguments and command-line flags are folded into the third spelling, the keys of
`speculative_config`; one function translates that. Without any of ours nothing is touched. Chains
are left to vLLM, except that several MTP modules of the target's own are chained by our worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vllm_specplus.config import (
    METHODS,
    MethodSpec,
    SpecPlusConfig,
    parse_methods,
    parse_step_costs,
    split_models,
)
from vllm_specplus.core.cost import CostModel
from vllm_specplus.core.growth import NUM_CHILDREN
from vllm_specplus.core.width import MOST_REQS, ladder, plan
from vllm_specplus.errors import VLLM_CHAINS, OptionError, bad_option, not_built
from vllm_specplus.proposers.heads.hf import check_loads
from vllm_specplus.shapes import Chain, LookaheadShape, StaticTree, parse_tree
from vllm_specplus.startup.derived import WIDTHS, derive, is_derived
from vllm_specplus.startup.host import (
    CPU_ENGINE,
    Engine,
    native_methods,
    native_rules,
    num_mtp_modules,
    tree_engine,
    wanted_engine,
)
from vllm_specplus.startup.mtp_modules import modules_worker, runs_several, takes_own_modules

Need = Literal["checks", "drafts", "trees"]
"""Groups of patches that translated arguments need; stock arguments and most chains need none."""

OPTIONS: dict[str, str] = {
    "speculative_model": "model",
    "num_speculative_tokens": "num_speculative_tokens",
    "speculative_tree": "tree",
    "speculative_verify": "verify",
    "speculative_step_costs": "step_costs",
    "ngram_prompt_lookup_max": "prompt_lookup_max",
    "ngram_prompt_lookup_min": "prompt_lookup_min",
    **{name: name for name in SpecPlusConfig.model_fields if name.startswith("lookahead_")},
}
"""Keyword argument (and flag) -> key of speculative_config."""

VLLM_ALIASES: dict[str, str] = {
    "spec_method": "method",
    "spec_model": "model",
    "spec_tokens": "num_speculative_tokens",
}
"""vLLM's own short spellings; they join in where one of ours is used."""

TREE_RULES = ("auto", "match")
DRAWN_RULES = ("rejection", "traversal")
"""For trees around a chain of vLLM's, which is drawn then."""
LOSSY_RULES = ("typical",)
"""For Medusa's trees, as its paper has it."""
_NATIVE_RULES = {"rejection": "standard", "block": "block"}
_OUR_NAMES = {method.native: name for name, method in METHODS.items() if method.native}
_OUR_KEYS = ("tree", "verify", "step_costs")


def tree_options(additional_config: Any) -> SpecPlusConfig | None:
    """Our options in an `additional_config`, where we put those of trees."""
    options = additional_config.get("specplus") if isinstance(additional_config, Mapping) else None
    return None if options is None else SpecPlusConfig.model_validate(options)


def speaks_ours(arguments: Mapping[str, Any]) -> bool:
    """Whether any of our spellings is used in arguments of EngineArgs."""
    if any(arguments.get(option) is not None for option in OPTIONS):
        return True
    config = arguments.get("speculative_config")
    if not isinstance(config, Mapping):
        return False
    method = config.get("method")
    names = method.split("+") if isinstance(method, str) else []
    ours = method not in native_methods() and any(name in METHODS for name in names)
    return ours or any(config.get(key) is not None for key in _OUR_KEYS)


def fold(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with our keywords and vLLM's aliases moved into `speculative_config`.

    Raises OptionError where the same thing is said twice with different values.
    """
    said = {
        name: arguments[name] for name in OPTIONS | VLLM_ALIASES if arguments.get(name) is not None
    }
    rest = _without_options(arguments)
    rest |= {name: None for name in VLLM_ALIASES if name in rest}
    config = {
        key.replace("-", "_"): value
        for key, value in (arguments.get("speculative_config") or {}).items()
        if value is not None
    }
    for option, value in said.items():
        if option == "speculative_model":
            specs = parse_methods(value)
            models = [spec.model for spec in specs if spec.model is not None]
            several = len(models) > 1  # of one method, whose name the second model keeps
            names = [spec.name for spec in specs[:1] if several] or [spec.name for spec in specs]
            _say(config, "method", "+".join(names), option)
            if models:
                _say(config, "model", f"+[{names[0]}]".join(models), option)
        else:
            _say(config, (OPTIONS | VLLM_ALIASES)[option], value, option)
    ahead = "lookahead" in str(config.get("method")).split("+")
    config.setdefault("tree", str(LookaheadShape.of(config).tree if ahead else Chain()))
    return rest | {"speculative_config": config}


def _without_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in OPTIONS}


def _say(config: dict[str, Any], key: str, value: Any, option: str) -> None:
    before = config.get(key)
    if before is not None and _meaning(key, before) != _meaning(key, value):
        raise bad_option(
            option, value, f"contradicts {key}={before!r} in speculative_config", "say it once"
        )
    config[key] = value


def _meaning(key: str, value: Any) -> Any:
    if key in ("tree", "step_costs") and not is_derived(value):
        return (parse_tree if key == "tree" else parse_step_costs)(value)
    return _OUR_NAMES.get(value, value) if key == "method" else value


def translate(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Need, ...]]:
    """What EngineArgs is to be built with instead of `arguments`, and which patches that needs.

    Raises OptionError for what cannot be meant and NotBuiltError for what is not available.
    """
    for_trees: tuple[Need, ...] = ("checks", "drafts", "trees")
    if not speaks_ours(arguments):
        translated = tree_options(arguments.get("additional_config"))
        return _without_options(arguments), for_trees if translated else ()
    result = fold(arguments)
    model = str(result.get("model"))
    keys = _with_depth(result["speculative_config"], model)
    config, others = read(derive(keys, model, result.get("max_num_seqs")))
    if is_native(config, model):
        native = native_config(config, config.methods[0], others.get("revision"))
        result["speculative_config"] = native | others
        heads = isinstance(config.methods[0].model, str) and METHODS[config.method].heads
        worker_cls = modules_worker(config, model) if takes_own_modules(config) else None
        checked = config.verify != "auto" or heads or worker_cls is not None
        needs: tuple[Need, ...] = ("checks",) if checked else ()
        if worker_cls is not None:
            _set(result, "worker_cls", worker_cls, unset="auto")
        if worker_cls is not None or config.method == "draft":
            needs += ("drafts",)
        return result, needs
    engine = tree_engine()
    _check_built(config, engine, model)
    _check_ranks(config)
    if takes_own_modules(config):
        modules_worker(config, model)
    widths = _widths(config, others, engine, result.get("max_num_seqs"))
    trunks = [spec for spec in config.methods if _by_level(spec)]
    if trunks and engine is not CPU_ENGINE:
        auto = config.model_copy(update={"verify": "auto"})
        chain = native_config(auto, trunks[0], others.get("revision"))
        if config.verify in DRAWN_RULES:
            chain["draft_sample_method"] = "probabilistic"
        result["speculative_config"] = chain | others | widths
    else:
        if any(spec.model for spec in trunks):
            config = config.model_copy(update={"revision": others.pop("revision", None)})
        _check_alone(others)
        result["speculative_config"] = widths | {
            "method": engine.method,
            "model": engine.drafter_cls,
            "num_speculative_tokens": config.num_nodes,
        }
    _set(result, "worker_cls", engine.worker_cls, unset="auto")
    additional = dict(result.get("additional_config") or {})
    _set(additional, "specplus", config.model_dump(mode="json"), unset=None)
    return result | {"additional_config": additional}, for_trees


def _with_depth(keys: dict[str, Any], model: str) -> dict[str, Any]:
    """The keys, with the model's own count of MTP modules for `[mtp]` if they have no depth."""
    own = str(keys.get("method")).split("+")
    given = keys.get("num_speculative_tokens") is not None or keys.get("model") is not None
    tree = keys["tree"]
    static = not is_derived(tree) and isinstance(parse_tree(tree), StaticTree)
    tuned = str(tree).startswith("tuned:")  # which has a depth
    if given or static or tuned or "mtp" not in own or not num_mtp_modules(model):
        return keys
    return keys | {"num_speculative_tokens": num_mtp_modules(model)}


def is_native(config: SpecPlusConfig, model: str) -> bool:
    """Whether vLLM itself runs what is asked for: a chain, but of heads and of several modules only
    on the V2 runner."""
    if not isinstance(config.tree, Chain) or len(config.methods) > 1:
        return False
    (spec,) = config.methods
    on_v1 = wanted_engine() is CPU_ENGINE
    if METHODS[spec.name].heads and spec.model is None:
        return num_mtp_modules(model) > 0 and not (on_v1 and runs_several(config, model))
    if METHODS[spec.name].heads:
        return not on_v1
    return METHODS[spec.name].native is not None


def _check_heads(config: SpecPlusConfig, model: str) -> None:
    """Raises OptionError for MTP without heads on a model without modules of its own."""
    for spec in config.methods:
        if METHODS[spec.name].heads and spec.model is None and not num_mtp_modules(model):
            raise bad_option(
                "speculative_model",
                config.speculative_model,
                f"with speculative_tree={str(config.tree)!r} needs heads for {model!r}",
                f"train them with `vllm-specplus train mtp3 --model {model} --prompts FILE --out "
                f"DIR` and write '{config.speculative_model}DIR'",
            )


def _widths(
    config: SpecPlusConfig, others: dict[str, Any], engine: Engine, max_num_reqs: int | None
) -> dict[str, Any]:
    """How many nodes at which batch size, taken out of `others` or from given costs.

    Nothing where costs are to be measured, and for the engine whose row budget follows each step.
    """
    if engine is CPU_ENGINE:
        return {}
    given = {WIDTHS: others.pop(WIDTHS)} if WIDTHS in others else {}
    if config.step_costs is None:
        return given
    if given:
        raise bad_option(WIDTHS, given[WIDTHS], "says what step_costs says", "give one of them")
    most = max_num_reqs or MOST_REQS
    widths = ladder(config.num_nodes, most)
    return {WIDTHS: plan(config, CostModel(config.step_costs), widths, most)}


def _set(arguments: dict[str, Any], name: str, value: Any, unset: Any) -> None:
    """Sets what our engine needs, unless the user has set it to something else."""
    before = arguments.get(name, unset)
    if before not in (unset, value):
        raise bad_option(name, before, "takes the place of what speculative_tree sets", "drop it")
    arguments[name] = value


def read(keys: Mapping[str, Any]) -> tuple[SpecPlusConfig, dict[str, Any]]:
    """Validates the third spelling: our config, and the keys that are vLLM's alone."""
    others = dict(keys)
    method, model = others.pop("method", None), others.pop("model", None)
    if method is None and model is None:
        raise OptionError(
            "speculative_model is missing beside the other speculative options; give "
            "speculative_model='[method]', or a draft model."
        )
    fields = SpecPlusConfig.model_fields.keys() & OPTIONS.values()
    options = {key: others.pop(key) for key in fields & others.keys()}
    for key in ("prompt_lookup_max", "prompt_lookup_min"):
        if key in others:
            options[f"ngram_{key}"] = others.pop(key)
    model = _local_path(model)
    text = model if method is None else f"[{_OUR_NAMES.get(method, method)}]{model or ''}"
    return SpecPlusConfig.from_options(options | {"speculative_model": text}), others


def _local_path(model: Any) -> Any:
    """Expands `~`; raises OptionError for what looks like a local path and is not there."""
    if isinstance(model, str) and len(parts := split_models(model)) > 1:
        first, rest = parts[0], [part.partition("]") for part in parts[1:]]
        return "+".join([_local_path(first), *(f"{m}]{_local_path(path)}" for m, _, path in rest)])
    if not isinstance(model, str) or not model.startswith(("/", ".", "~")):
        return model
    path = Path(model).expanduser()
    if not path.exists():
        raise bad_option(
            "speculative_model", model, "is a path that does not exist", "correct the path"
        )
    return str(path) if model.startswith("~") else model


def native_config(config: SpecPlusConfig, spec: MethodSpec, revision: str | None) -> dict[str, Any]:
    """vLLM's own speculative_config for a chain of one of its methods; `revision` of a model."""
    own = METHODS[spec.name]
    native: dict[str, Any] = {
        "method": METHODS["mtp"].native if own.heads else own.native,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    if spec.model is not None:
        native["model"] = spec.model
        if own.heads:
            check_loads(spec.model, revision)
    for key in ("prompt_lookup_max", "prompt_lookup_min"):
        if spec.name == "ngram" and f"ngram_{key}" in config.model_fields_set:
            native[key] = getattr(config, f"ngram_{key}")
    if config.verify != "auto":
        native["rejection_sample_method"] = _native_rule(config.verify)
    return native


def _native_rule(verify: str) -> str:
    there = [ours for ours, native in _NATIVE_RULES.items() if native in native_rules()]
    if verify not in there:
        raise not_built(
            "speculative_verify",
            verify,
            "is not available for vLLM's own chains",
            f"use 'auto', {' or '.join(map(repr, there))}",
        )
    return _NATIVE_RULES[verify]


def _check_built(config: SpecPlusConfig, engine: Engine, model: str) -> None:
    """Raises for what the engine does not have."""
    _check_heads(config, model)
    chains = ", ".join(f"[{name}]" for name in _OUR_NAMES.values())
    trees = ", ".join(f"[{name}]" for name in engine.methods)
    on_cpu = engine is CPU_ENGINE
    ours = [
        s
        for s in config.methods
        if on_cpu or METHODS[s.name].heads or METHODS[s.name].native is None
    ]
    grows = any(spec.model or (on_cpu and METHODS[spec.name].heads) for spec in ours)
    chain = isinstance(config.tree, Chain) and not grows
    if chain or config.method not in engine.methods:
        raise not_built(
            "speculative_model",
            config.speculative_model,
            f"with speculative_tree={str(config.tree)!r} is not available in the engine "
            f"{engine.name}",
            f"there are chains of {chains}, and static and dynamic trees of {trees}",
        )
    medusa = any(spec.name == "medusa" for spec in config.methods)
    drawn = len(config.methods) > 1 and not isinstance(config.tree, StaticTree)
    drawn = drawn and any(map(_by_level, config.methods))
    more = LOSSY_RULES if medusa else DRAWN_RULES if drawn else ()
    rules = TREE_RULES + (() if engine is CPU_ENGINE else more)
    if config.verify not in rules:
        raise not_built(
            "speculative_verify",
            config.verify,
            f"is not available for trees of {config.speculative_model}",
            f"use {' or '.join(map(repr, rules))}",
        )


def _by_level(spec: MethodSpec) -> bool:
    """Whether it drafts with a model, level by level."""
    return METHODS[spec.name].model != "none" and spec.name != "medusa"


def _check_ranks(config: SpecPlusConfig) -> None:
    """Raises OptionError for nodes of a static tree that are never drafted."""
    if not all(map(_by_level, config.methods)) or not isinstance(config.tree, StaticTree):
        return
    if (rank := max(path[-1] for path in config.tree.paths)) >= NUM_CHILDREN:
        raise bad_option(
            "speculative_tree",
            str(config.tree),
            f"has a node of rank {rank}, and {config.speculative_model} drafts {NUM_CHILDREN} "
            f"tokens after a node, ranks 0 to {NUM_CHILDREN - 1}",
            "leave such nodes out",
        )


def _check_alone(others: Mapping[str, Any]) -> None:
    for key, value in others.items():
        raise bad_option(
            f"speculative_config[{key!r}]",
            value,
            "has no meaning for a token tree",
            f"leave it out, or use {VLLM_CHAINS}",
        )
