"""vLLM's own drafters under n-gram trees: `python -m tests.engine.v2_drafters GROUP`.

The trunk of a tree of as many nodes as the drafter drafts is its chain, so it must accept exactly
what vLLM's own chain accepts: a wrong row, hidden state, position or KV slot shows at once.

Of the scenarios `mtp3`, each was seen to fail: with hidden states of the other kind, with the step
not handed on to the inner model, with the third layer left empty, and with steps that begin again
with the first module. `left chain` failed for several modules on vLLM's own windows, `few rows`
with one row too few, `short windows` with rows that were not kept, all with rows of another place.
"""

from __future__ import annotations

import tests.engine.interpreter  # noqa: F401  (before vLLM)

# isort: split
from collections.abc import Callable
from dataclasses import replace
from itertools import chain as chain_of
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import max_decode_query_len

from tests.engine import v2
from tests.engine.distribution import PROMPT, conditionals, joint
from tests.engine.drafters import drafter_path
from tests.engine.engines import Engine, Request
from tests.engine.models import TINY_VOCAB_SIZE
from tests.engine.test_distribution import SMALLEST_P, p_value
from tests.engine.v2_draft_engines import (
    DEPTH,
    DRAFTERS,
    NUM_NODES,
    drafting,
    engine,
    requests,
    texts,
)
from tests.engine.v2_draft_kv import as_prompts_leave_it, branches, keeping
from tests.engine.v2_draft_trees import by_heart, chains, dense, one_head_pass, second, warm_up
from vllm_specplus.core.graft import Trunk
from vllm_specplus.core.mtp_models import MTP_MODELS, HiddenStateFrom
from vllm_specplus.engine import v2_chain as chain
from vllm_specplus.engine import v2_speculator

LENGTH, NUM_SEQUENCES = 3, 320
HIDDEN_STATES: tuple[HiddenStateFrom, ...] = ("previous", "target")


def trunk(name: str) -> None:
    """vLLM's own chain, and a tree that has room for nothing else."""
    wanted, native = requests(name), drafting(name)
    ours, plain = drafting(name, DEPTH, ngram=False), texts(engine(DRAFTERS[name][1]), wanted)
    with chains():
        assert texts(native, wanted) == texts(ours, wanted) == plain
    assert ours.extra_tokens == native.extra_tokens > 0


def tree(name: str, wanted: list[Request], **options: Any) -> None:
    moved = v2.MOVED.moved
    plain = engine(DRAFTERS[name][1], tuple(options.items()))
    assert texts(drafting(name, NUM_NODES, **options), wanted) == texts(plain, wanted)
    assert v2.MOVED.moved > moved, "no accepted node had to move"


def seeded(name: str, num: int = 6) -> list[Request]:
    temperature = 0.3 if name == "heads" else 1  # of a larger vocabulary
    return [
        replace(r, params=SamplingParams(temperature=temperature, seed=seed, max_tokens=20))
        for seed, r in enumerate(requests(name, num))
    ]


def preemption(name: str) -> None:
    wanted = requests(name, max_tokens=70)
    options: dict[str, Any] = dict(num_gpu_blocks_override=12, max_model_len=256)
    scheduler = drafting(name, NUM_NODES, **options).scheduler
    with mock.patch.object(
        scheduler, "_preempt_request", side_effect=scheduler._preempt_request
    ) as preempted:
        tree(name, wanted, **options)
    assert preempted.called


def asynchronous(name: str) -> None:
    with v2.asynchronous():
        tree(name, requests(name), max_num_seqs=6)


def behind_decoys(trunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`graft` with a wrong sibling before every node of the trunk, so that all of it must move."""
    nodes = torch.stack([(trunk + 1) % TINY_VOCAB_SIZE, trunk], 2).flatten(1)
    parents = torch.tensor([-1, *(2 * depth for depth in range(DEPTH) for _ in range(2))])
    return torch.nn.functional.pad(nodes, (1, 0), value=-1), parents.expand(len(trunk), -1)


def moved_trunk(name: str) -> None:
    """As much is accepted as of vLLM's own chain. Other chains are drafted when the accepted path
    is taken out, and worse ones by drafters that are right for a reason: a draft model, heads."""
    wanted, native, ours = requests(name), drafting(name), drafting(name, 2 * DEPTH)
    plain = texts(native, wanted)
    of, drafted = chain.chain_batch, []

    def recorded(trunk: Trunk, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        drafted.append(trunk.tokens.tolist())
        return behind_decoys(trunk.tokens[:, 1 : 1 + DEPTH])

    with chains(), mock.patch.object(v2_speculator, "graft", recorded):
        assert texts(ours, wanted) == plain
        accepted, with_path = ours.extra_tokens, drafted.copy()
        drafted.clear()
        assert accepted >= native.extra_tokens
        without = lambda batch, path, *rest: of(batch, path[:, :1], *rest)  # noqa: E731
        with mock.patch.object(chain, "chain_batch", without):
            assert texts(ours, wanted) == plain
    assert drafted != with_path
    assert ours.extra_tokens < 0.9 * accepted or name not in ("draft", "heads")


def left_chain(name: str, **options: Any) -> None:
    """After paths that leave its chain, a drafter keeps what it would have of a prompt."""
    wanted, ours = requests(name), drafting(name, 2 * DEPTH, **options)
    wanted.append(replace(wanted[0], prompt=wanted[0].prompt[:1]))
    plain = texts(engine(DRAFTERS[name][1]), wanted)
    known = [[*r.prompt, *text] for r, text in zip(wanted, plain, strict=True)]
    with keeping(ours) as kept:
        with branches(known, DEPTH):
            assert texts(ours, wanted) == plain
        assert ours.extra_tokens > len(wanted) * len(plain[0]) / 3
        assert len(kept) > len(wanted)
        as_prompts_leave_it(ours, kept)


def few_rows(name: str) -> None:
    """Steps that have no rows to spare for all, where as many are run again as were rejected: that
    is enough for a path that is the chain's."""
    wanted = requests(name)
    options: dict[str, Any] = dict(max_num_batched_tokens=24, max_num_seqs=6)
    plain, native = texts(engine(DRAFTERS[name][1]), wanted), drafting(name, **options)
    ours = drafting(name, DEPTH, ngram=False, **options)
    rooms, of = [], chain.chain_batch

    def recorded(batch: Any, path: Any, depth: int, *rest: int) -> chain.Chains:
        windows, chains = of(batch, path, depth, *rest), of(batch, path, depth, 0, 0)
        rooms.append(windows.batch.num_tokens - chains.batch.num_tokens)
        roots = torch.from_numpy(batch.query_start_loc_np[1 : batch.num_reqs + 1] - 1)
        roots = (roots - batch.num_draft_tokens_per_req).repeat_interleave(
            torch.from_numpy(windows.batch.num_scheduled_tokens)
        )
        assert torch.equal(windows.committed, windows.rows.minimum(roots))
        assert windows.batch.num_tokens <= options["max_num_batched_tokens"]
        return windows

    assert texts(native, wanted) == plain
    with chains(), mock.patch.object(chain, "chain_batch", recorded), keeping(ours) as kept:
        assert texts(ours, wanted) == plain
        assert ours.extra_tokens == native.extra_tokens > 0
        assert min(rooms) < max(rooms) and len(kept) > len(wanted)
        as_prompts_leave_it(ours, kept)


def short_windows() -> None:
    """Windows of one row, as steps without room or drafts have, before longer ones: only what they
    left is run again. Later modules keep what was not verified; the first one's rows are right."""
    config = dict(
        method="mtp3+ngram",
        model=drafter_path("heads"),
        num_speculative_tokens=DEPTH,
        tree=f"dynamic:{NUM_NODES}",
        num_speculative_tokens_per_batch_size=[(1, 1, NUM_NODES), (2, 8, 0)],
    )
    ours = engine.__wrapped__("llama", (("speculative_config", config),))
    first, second = requests("heads", 2)
    brief = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    wanted = [first, replace(second, params=brief, arrival=3)]
    plain, of, lens = texts(engine("llama"), wanted), chain.chain_batch, set[int]()

    def refused(batch: Any, path: Any, depth: int, again: int, most: int) -> chain.Chains:
        chains = of(batch, path, depth, again, most if batch.num_reqs == 1 else 0)
        lens.update(chains.batch.num_scheduled_tokens.tolist())
        return chains

    with mock.patch.object(chain, "chain_batch", refused), keeping(ours) as kept:
        assert texts(ours, wanted) == plain
        assert {1, 2 * DEPTH} <= lens
        as_prompts_leave_it(ours, kept, num_levels=1)


def native_modules(name: str) -> None:
    """`[mtp]` of three modules runs as vLLM's own chain does where vLLM's is right."""
    config = {"method": "mtp", "num_speculative_tokens": DEPTH}
    stock = engine.__wrapped__(DRAFTERS[name][1], (("speculative_config", config),))
    wanted, ours = requests(name), drafting(name)
    assert texts(stock, wanted) == texts(ours, wanted)
    assert ours.extra_tokens == stock.extra_tokens > 0


def modules(run_by: Engine) -> list[torch.nn.Module]:
    """The MTP layers of an engine's drafter."""
    core = run_by.llm.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.speculator.model.model
    layers = getattr(model, "mtp", model).layers
    return list(layers.values() if isinstance(layers, torch.nn.ModuleDict) else layers)


def all_modules(target: str, num_modules: int) -> None:
    """Every step runs a layer of its own, with the weights of its module, and draws on it."""
    wanted = requests(target)
    plain = texts(engine(target), wanted)
    ours = engine(target, (("speculative_model", "[mtp3]"),))
    layers, ran = modules(ours), []
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    assert texts(ours, wanted) == plain
    assert ran == list(range(DEPTH)) * (len(ran) // DEPTH) and ran
    for index, layer in enumerate(layers[1:], 1):
        pairs = zip(layer.parameters(), layers[index - 1].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == (index >= num_modules)
    accepted = ours.extra_tokens
    for layer in reversed(layers):
        hook = layer.register_forward_hook(_spoil)
        assert texts(ours, wanted) == plain
        assert ours.extra_tokens < accepted
        accepted = ours.extra_tokens
        hook.remove()


def _spoil(_: Any, __: Any, output: Any) -> Any:
    return tuple(map(torch.neg, output)) if isinstance(output, tuple) else -output


def conventions(target: str, trained: str) -> None:
    """A module that is fed another hidden state than it was trained on costs acceptance."""
    wanted, accepted = requests(target), {}
    plain = texts(engine(target), wanted)
    for hidden_state_from in HIDDEN_STATES:
        row = replace(MTP_MODELS["glm4_moe_mtp"], hidden_state_from=hidden_state_from)
        with mock.patch.dict(MTP_MODELS, {"glm4_moe_mtp": row}):
            for shape in ("chain", f"dynamic:{DEPTH}"):
                options = dict(speculative_model="[mtp3]", speculative_tree=shape)
                ours = engine.__wrapped__(target, tuple(options.items()))
                with chains():
                    assert texts(ours, wanted) == plain
                accepted[hidden_state_from, shape] = ours.extra_tokens
    for hidden_state_from in HIDDEN_STATES:
        assert len({accepted[hidden_state_from, s] for s in ("chain", f"dynamic:{DEPTH}")}) == 1
    right, wrong = (accepted[h, "chain"] for h in sorted(HIDDEN_STATES, key=lambda h: h != trained))
    assert right > 1.1 * wrong, accepted


def distribution(rule: str, name: str = "draft") -> None:
    """Chi-square of sampled text against the target's exact distribution, per position and pair."""
    probs = joint(conditionals(Path(drafter_path(DRAFTERS[name][1])), LENGTH))
    ours = drafting(name, NUM_NODES, speculative_verify=rule, max_num_seqs=64)
    settings = SamplingParams(temperature=1, max_tokens=LENGTH, ignore_eos=True)
    tokens = np.array(texts(ours, [Request(PROMPT, settings)] * NUM_SEQUENCES))
    assert ours.extra_tokens > NUM_SEQUENCES / 4
    for kept in ((0,), (1,), (2,), (0, 1), (1, 2)):
        summed = tuple(axis for axis in range(LENGTH) if axis not in kept)
        assert p_value(tokens[:, kept], probs.sum(summed)) > SMALLEST_P, (rule, kept)


def drawn(name: str, rule: str) -> None:
    """Around a sampled chain greedy text is plain text, and sampled text accepts drafts."""
    wanted, ours = requests(name), drafting(name, NUM_NODES, speculative_verify=rule)
    assert texts(ours, wanted) == texts(engine(DRAFTERS[name][1]), wanted)
    assert ours.extra_tokens > 0
    ours.run(seeded(name))
    assert ours.extra_tokens > 0


def graphs(name: str) -> None:
    """On a GPU all is graphed but a first pass over the metadata of the target's trees."""
    executor = drafting(name, DEPTH).llm.llm_engine.engine_core.engine_core.model_executor
    speculator = executor.driver_worker.worker.model_runner.speculator
    managers = {n for n in vars(speculator.__wrapped__) if n.endswith("cudagraph_manager")}
    before = {manager: getattr(speculator, manager) for manager in managers}
    with mock.patch.object(CpuPlatform, "get_global_graph_pool"):
        speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    for manager in managers:
        mode = getattr(speculator, manager).cudagraph_mode
        assert mode.has_full_cudagraphs() == (manager != "prefill_cudagraph_manager")
        if name == "mtp, 3 modules":  # which run two earlier rows again
            assert getattr(speculator, manager).decode_query_len == 1 + DEPTH + 2
            for group in chain_of(*speculator.attn_groups):
                config = group.get_metadata_builder().vllm_config
                assert max_decode_query_len(config) == 1 + DEPTH + 2
    for manager, value in before.items():
        setattr(speculator.__wrapped__, manager, value)
    assert managers


def scenarios(name: str) -> dict[str, Callable[[], None]]:
    """vLLM tells models with experts from others by process, so they are groups of their own."""
    group = "experts" if DRAFTERS[name][1].startswith(("glm", "mimo_v2")) else "drafter"
    of_all = {
        "trunk": lambda: trunk(name),
        "tree": lambda: tree(name, [*requests(name), *requests(name, 1, presence_penalty=0.5)]),
        "tree, seed": lambda: tree(name, seeded(name)),
        "moved trunk": lambda: moved_trunk(name),
        "left chain": lambda: left_chain(name),
    }
    of_eagle = {
        "chunked prompts": lambda: tree(name, seeded(name), max_num_batched_tokens=32),
        "longest length": lambda: tree(name, requests(name, 4, max_tokens=None), max_model_len=64),
    }
    of_some = {
        "preemption": lambda: preemption(name),
        "graphs": lambda: graphs(name),
        "async": lambda: asynchronous(name),
        "warm-up": lambda: warm_up(name),
        "one head pass": lambda: one_head_pass(name),
    }
    runs = of_all | (of_eagle if name in ("eagle", "heads") else {})
    runs |= of_some if name in ("eagle", "mtp, 3 modules") else {}
    if name == "heads":
        runs["preemption"] = of_some["preemption"]
        runs["few rows"] = lambda: few_rows(name)
        runs["short windows"] = short_windows
    if name == "mtp, 3 modules":
        chunks = dict(max_num_batched_tokens=32)
        runs["left chain, chunked prompts"] = lambda: left_chain(name, **chunks)
    if name in ("heads", "mtp, 3 modules", "eagle", "draft"):
        runs["second best"] = lambda: second(name)
    if name == "mtp3, mimo":
        runs = {"trunk": of_all["trunk"]}
    if name == "mtp3, mimo v2":  # whose modules have windows, and caches of another group
        runs = {title: of_all[title] for title in ("trunk", "tree", "left chain")}
    return {f"{group}: {name}, {title}": run for title, run in runs.items()}


SCENARIOS = {title: run for name in DRAFTERS for title, run in scenarios(name).items()} | {
    "experts: mtp, 3 modules, as vLLM": lambda: native_modules("mtp, 3 modules"),
    "experts: mtp3, 3 modules": lambda: all_modules("glm3", 3),
    "experts: mtp3, 2 modules": lambda: all_modules("glm2", 2),
    "experts: mtp3, qwen, 3 modules": lambda: all_modules("qwen3", 3),
    "experts: mtp3, mimo v2, 3 modules": lambda: all_modules("mimo_v2", 3),
    "experts: mtp3, trained on the one before": lambda: conventions("glm3", "previous"),
    "experts: mtp3, trained on the target": lambda: conventions("glm3 from target", "target"),
    "drafter: heads, drawn by rejection": lambda: drawn("heads", "rejection"),
    "drafter: heads, drawn by traversal": lambda: drawn("heads", "traversal"),
    "drafter: draft, distribution by rejection": lambda: distribution("rejection"),
    "drafter: draft, distribution by traversal": lambda: distribution("traversal"),
    "drafter: heads, trees of the dense modules": lambda: dense("previous"),
    "drafter: heads that take the target's states, trees of the dense modules": lambda: dense(
        "target", tied=True
    ),
    "drafter: heads of a sliding window, trees of the dense modules": lambda: dense(
        "previous", model="sliding"
    ),
    "drafter: heads, by heart": lambda: by_heart("previous"),
    "drafter: heads that take the target's states, by heart": lambda: by_heart("target", tied=True),
    "drafter: heads, 1 token, by heart": lambda: by_heart("previous", depth=1),
    "drafter: heads, 5 tokens of 3 modules, by heart": lambda: by_heart("previous", depth=5),
    "drafter: heads of a sliding window, by heart": lambda: by_heart("previous", model="sliding"),
}

if __name__ == "__main__":
    v2.main(SCENARIOS)
