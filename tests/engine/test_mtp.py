"""MTP heads on the CPU engine: the text stays that of plain decoding, and the drafts are those of
the dense modules.

Sabotages that the dense modules caught: committed rows that run again, a node that takes the hidden
state of the position before or of the wrong level, that sees only itself, a context that ends one
slot early. Those that fitted heads catch are below.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from specplus_kernels import int8_linear
from torch.nn import functional

from tests.engine.engines import Request, get_engine, reference
from tests.engine.features import assert_equal, mixed, params, prompts, requests
from tests.engine.heads import fitted, random_path
from tests.train.tiny import PROMPT_LEN
from vllm_specplus.engine.drafters import paged
from vllm_specplus.errors import OptionError
from vllm_specplus.proposers import by_level, levels
from vllm_specplus.proposers.by_level import NUM_CHILDREN
from vllm_specplus.proposers.heads import int8
from vllm_specplus.proposers.heads.checkpoint import load_heads
from vllm_specplus.proposers.heads.int8 import drafting_dtype
from vllm_specplus.proposers.heads.mtp import MTPHeads

SHAPES = ("chain", "dynamic:12", "static:[(0,),(1,),(0,0),(0,1),(1,0),(0,0,0)]")
METHODS = ("mtp3", "mtp3+ngram")
PROB_TOLERANCE = 1e-4  # fp32: the same rows in matrices of other heights


def engine(model="llama", method="mtp3", tree="dynamic:12", heads=None, **options):
    return get_engine(
        model,
        "dynamic",
        speculative_model=f"[{method}]{heads or random_path()}",
        num_speculative_tokens=3,
        speculative_tree=tree,
        **options,
    )


@pytest.mark.parametrize("feature", ["greedy", "seed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tree", SHAPES)
@pytest.mark.parametrize("model", ["llama", pytest.param("sliding", marks=pytest.mark.slow)])
def test_text_equals_plain(model, tree, method, feature):
    asked = requests(feature, 4)
    plain = reference(model, asked)
    drafting = engine(model, method, tree)
    assert_equal(drafting.run(asked), plain)
    assert drafting.probe.drafted > 0
    for one, output in zip(asked, plain, strict=True):
        assert_equal(drafting.run([one]), [output])


@pytest.mark.parametrize("schedule", ["chunked_prefill", "preemption"])
@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
def test_all_features_in_one_batch(tree, schedule):
    options = {
        "chunked_prefill": dict(max_num_batched_tokens=64, max_num_seqs=16),
        "preemption": dict(num_gpu_blocks_override=60, max_model_len=256),
    }[schedule]
    asked = mixed(arrivals=lambda index: index // 3)
    plain = reference("llama", asked)
    assert_equal(engine(method="mtp3+ngram", tree=tree, **options).run(asked), plain)


@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
def test_the_prefix_cache_holds_and_aborts_leave_the_others_alone(tree):
    first = requests("greedy", 4, max_tokens=120, ignore_eos=True)
    drafting = engine(tree=tree, prefix_cache_retention_interval=None)
    outputs = drafting.run(
        [replace(r, abort_at=9 if i == 2 else None) for i, r in enumerate(first)]
    )
    plain = reference("llama", first)
    kept = [0, 1, 3]
    assert_equal([outputs[i] for i in kept], [plain[i] for i in kept])
    second = [
        Request([*first[i].prompt, *plain[i].outputs[0].token_ids, 300], first[i].params)
        for i in range(4)
    ]
    outputs = drafting.run(second, keep_cache=True)
    assert_equal(outputs, reference("llama", second))
    assert all(outputs[i].num_cached_tokens > len(first[i].prompt) + 32 for i in kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
def test_requests_run_to_the_longest_length(tree, method):
    asked = requests("greedy", 4, max_tokens=None, ignore_eos=True)
    asked += [Request([300] * n, params("greedy", max_tokens=None)) for n in (1, 126, 127)]
    plain = reference("llama", asked, max_model_len=128)
    assert_equal(engine(method=method, tree=tree, max_model_len=128).run(asked), plain)


def test_heads_of_another_model_are_refused():
    with pytest.raises(OptionError, match="hidden_size 32, but the model has 64"):
        engine(heads=random_path(hidden_size=32))


def watch_drafts(monkeypatch):
    """(tokens so far, path, {token: probability}) of everything that is drafted, and the target's
    hidden states by position."""
    drafted: list[tuple[list[int], by_level.Path, dict[int, float]]] = []
    hidden_states: dict[int, torch.Tensor] = {}
    branch, absorb = by_level._Draft.branch, by_level.LevelProposer.absorb

    def branching(self, level, children):
        known = self.request.token_ids.tolist()
        drafted.extend(
            (known, path, below) for path, below in zip(self.frontier, children, strict=True)
        )
        branch(self, level, children)

    def absorbing(self, req_id, start, rows):
        for position, row in enumerate(rows.clone(), start=start):
            hidden_states[position] = row
        absorb(self, req_id, start, rows)

    monkeypatch.setattr(by_level._Draft, "branch", branching)
    monkeypatch.setattr(by_level.LevelProposer, "absorb", absorbing)
    return drafted, hidden_states


def watch_firsts(monkeypatch):
    """From which position on rows see what is committed, of all that is drafted."""
    firsts: list[int] = []
    rows = by_level._Draft.rows

    def watched(self, level):
        of_level = rows(self, level)
        firsts.append(of_level.first)
        return of_level

    monkeypatch.setattr(by_level._Draft, "rows", watched)
    return firsts


def mismatches(drafted, hidden_states, model, heads, first):
    """How many of the drafts are not what the dense modules give after the sequence from its
    `first` token on."""
    wrong = 0
    for known, path, below in drafted:
        target_states = torch.stack([hidden_states[t] for t in range(first, len(known) - 1)])
        tokens = torch.tensor([*known[first + 1 :], *path, 0, 0][: len(known) + 1 - first])
        embeddings = functional.embedding(tokens, model._embedding) * model._embed_scale
        state = heads(target_states[None], embeddings[None])[len(path), 0, -1]
        (expected,) = model.best_tokens(len(path), state[None], NUM_CHILDREN)
        close = below.keys() == expected.keys() and all(
            abs(below[token] - prob) < PROB_TOLERANCE for token, prob in expected.items()
        )
        wrong += not close
    return wrong


@pytest.mark.parametrize("hidden_state_from", ["previous", "target"])
@pytest.mark.parametrize("tree", ["chain", "dynamic:12"])
@pytest.mark.parametrize("most", [by_level.MAX_CAUGHT_UP, 40])
@torch.inference_mode()
def test_drafts_are_those_of_the_dense_modules(most, tree, hidden_state_from, monkeypatch):
    """Over the whole text, or from a block on where modules began anew behind a long prompt."""
    monkeypatch.setattr(by_level, "MAX_CAUGHT_UP", most)
    monkeypatch.setattr(by_level, "LEAST_CAUGHT_UP", 20)
    path = random_path(hidden_state_from=hidden_state_from)
    drafting = engine("sliding", "mtp3+ngram", tree, path, max_num_batched_tokens=64)
    heads = MTPHeads.from_checkpoint(load_heads(path))
    drafted, hidden_states = watch_drafts(monkeypatch)
    firsts, begun = watch_firsts(monkeypatch), set[int]()
    for request in [Request(p, params("greedy", max_tokens=30)) for p in prompts(4, longest=150)]:
        drafted.clear()
        hidden_states.clear()
        firsts.clear()
        drafting.run([request])
        (first,) = set(firsts)
        begun.add(first)
        assert {len(path) for _, path, _ in drafted} == {0, 1, 2}
        model = drafting.spec_round.proposer.model
        assert mismatches(drafted, hidden_states, model, heads, first) == 0
    assert (begun == {0}) == (most > 150)
    assert drafting.extra_tokens > 0


def other_hidden_states(monkeypatch):
    """Every row takes the target's hidden state of the position before."""
    absorb = by_level.LevelProposer.absorb
    monkeypatch.setattr(
        by_level.LevelProposer,
        "absorb",
        lambda self, req_id, start, rows: absorb(self, req_id, start, rows.roll(1, 0)),
    )


def other_positions(monkeypatch):
    """Rows stand twice as far apart as they should."""
    positions = levels.RequestRows.positions
    monkeypatch.setattr(levels.RequestRows, "positions", lambda self: 2 * positions(self))


def other_slots(monkeypatch):
    """Keys and values are written two slots too early. One costs heads that take the target's
    states about 0.2 at the last depth, which is the bound's distance: CPUs fit them differently."""
    rows = paged.paged_rows

    def shifted(*args):
        of_level = rows(*args)
        return replace(of_level, slot_mapping=(of_level.slot_mapping - 2).clamp(min=0))

    monkeypatch.setattr(paged, "paged_rows", shifted)


SABOTAGES = [None, other_hidden_states, other_positions, other_slots]


@pytest.mark.slow
@pytest.mark.parametrize("hidden_state_from", ["previous", "target"])
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_fitted_heads_are_accepted(sabotage, hidden_state_from, monkeypatch):
    heads, texts = fitted("llama", hidden_state_from=hidden_state_from, tied=False)
    drafting = engine(tree="chain", heads=heads)
    if sabotage is not None:
        sabotage(monkeypatch)
    stats = drafting.spec_round.stats
    drafts, accepted = stats.num_drafts, list(stats.num_accepted_tokens_per_pos)
    asked = [Request(text[:PROMPT_LEN], params("greedy", max_tokens=34)) for text in texts]
    outputs = drafting.run(asked)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [t[PROMPT_LEN:] for t in texts]
    drafts, per_pos = stats.num_drafts - drafts, stats.num_accepted_tokens_per_pos
    rates = [(n - before) / drafts for n, before in zip(per_pos, accepted, strict=True)][:3]
    if sabotage is None:
        assert min(rates) > 0.9, rates
    else:
        assert min(rates) < 0.75, rates


def other_outputs(monkeypatch):
    """The outputs of matrices in int8 are those of the rows beside."""
    monkeypatch.setattr(int8, "int8_linear", lambda x, weight: int8_linear(x, weight).roll(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [None, other_outputs])
def test_fitted_heads_in_16_bits(sabotage, monkeypatch):
    """Their matrices are int8 where the CPU has a kernel for it. In bfloat16 the target writes
    other texts than in float32, where the heads learned them: those that are the same count."""
    if sabotage is not None:
        if drafting_dtype(torch.bfloat16) is torch.bfloat16:
            pytest.skip("no matrix is int8 on a CPU without AVX512-VNNI")
        sabotage(monkeypatch)
    heads, texts = fitted("llama", sure=True, hidden_state_from="previous", tied=False)
    drafting = engine(tree="chain", heads=heads, dtype="bfloat16")
    stats, rates = drafting.spec_round.stats, []
    for text in texts:
        drafts, accepted = stats.num_drafts, list(stats.num_accepted_tokens_per_pos)
        [output] = drafting.run([Request(text[:PROMPT_LEN], params("greedy", max_tokens=34))])
        if list(output.outputs[0].token_ids) == text[PROMPT_LEN:]:
            per_pos, drafts = stats.num_accepted_tokens_per_pos, stats.num_drafts - drafts
            rates.append([(per_pos[i] - accepted[i]) / drafts for i in range(3)])
    assert len(rates) > 1
    lowest = min(sum(depth) / len(rates) for depth in zip(*rates, strict=True))
    assert lowest > 0.9 if sabotage is None else lowest < 0.5
