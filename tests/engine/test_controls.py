"""Negative controls: the equality tests notice an engine that is wrong in one place."""

from __future__ import annotations

import pytest
import torch

from tests.engine.engines import get_engine, reference
from tests.engine.features import differ, requests
from vllm_specplus import round as spec_round
from vllm_specplus.engine import sampling


def no_commit(patch, engine):
    """The accepted path's keys and values stay where they were written."""
    nothing = torch.zeros(0, dtype=torch.long)
    patch.setattr(engine.probe, "_commit", lambda *_: spec_round.Moves(nothing, nothing))


def no_mask(patch, engine):
    """Tree rows see all rows before them."""

    def causal(staged, num_rows):
        masks = torch.zeros(num_rows, 1, dtype=torch.int64)
        valid = staged.trees.valid()
        before = (2 << torch.arange(valid.shape[1])) - 1
        masks[staged.row_index[valid], 0] = before.expand_as(valid)[valid]
        return masks

    patch.setattr(spec_round.Staged, "row_masks", causal)


def no_depth_positions(patch, engine):
    """Tree rows keep the sequential positions of their slots."""
    patch.setattr(spec_round.Staged, "tree_positions", lambda *_: None)


def no_ancestor_check(patch, engine):
    """Every node that its parent's target token equals is accepted, on the path or not."""

    def matched(trees, target_tokens):
        wanted = target_tokens.gather(1, trees.parents.clamp(min=0))
        hit = trees.tokens == wanted
        hit[:, 0] = True
        return hit & trees.valid()

    patch.setattr(spec_round, "match", matched)


def chain_histories(patch, engine):
    """Penalties of a row count all rows before it, ancestors or not."""

    def flat(source):
        tokens = list(source.tree.tokens)
        return [[*source.output_token_ids, *tokens[:row]] for row in range(len(tokens) + 1)]

    patch.setattr(sampling, "_histories", flat)


def frozen_seeds(patch, engine):
    """A request's generator stays where it was."""
    patch.setattr(sampling.RowSamples, "advance", lambda *_: None)


CONTROLS = [
    (no_commit, "greedy"),
    (no_mask, "greedy"),
    (no_depth_positions, "greedy"),
    (no_ancestor_check, "greedy"),
    (chain_histories, "frequency_penalty"),
    (frozen_seeds, "seed"),
]


@pytest.mark.parametrize(("sabotage", "feature"), CONTROLS)
@pytest.mark.parametrize("model", ["llama", "sliding"])
def test_sabotage_is_noticed(model, sabotage, feature, monkeypatch):
    asked = requests(feature, 6)
    plain = reference(model, asked)
    engine = get_engine(model, "oracle")
    assert not differ(engine.run(asked), plain)
    with monkeypatch.context() as patch:
        sabotage(patch, engine)
        assert differ(engine.run(asked), plain)
