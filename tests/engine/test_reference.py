"""Plain decoding does what each feature asks for, so that equality with it means something."""

from __future__ import annotations

import pytest

from tests.engine.engines import get_engine
from tests.engine.features import FEATURES, differ, requests

SAME_AS_GREEDY = {"logprobs", "logprob_token_ids", "prompt_logprobs"}
SAME_AS_SEED = {"seed", "logprobs_seed"}


@pytest.mark.parametrize("feature", sorted(set(FEATURES) - SAME_AS_GREEDY - SAME_AS_SEED))
def test_feature_changes_the_output(feature):
    plain = get_engine("llama", "plain")
    base = "seed" if FEATURES[feature].get("temperature") else "greedy"
    if feature == "greedy":
        base = "seed"
    assert differ(plain.run(requests(feature, 4)), plain.run(requests(base, 4)))
