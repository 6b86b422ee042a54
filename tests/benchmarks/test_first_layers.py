"""The draft model of benchmarks/first_layers.py is the target without its last layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.first_layers import main
from tests.engine.models import BUILDERS, save


def test_the_first_layers(tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "draft"
    save(BUILDERS["sliding"](), target)
    main(str(target), 2, out)
    whole, draft = map(AutoModelForCausalLM.from_pretrained, (target, out))
    assert draft.config.layer_types == whole.config.layer_types[:2]
    assert len(draft.model.layers) == 2
    for name, weight in draft.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name)), name
    with pytest.raises(ValueError, match=r"4 layers: .* has 4, take fewer"):
        main(str(target), 4, tmp_path / "none")
    assert not (tmp_path / "none").exists()
