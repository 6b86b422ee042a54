"""A draft model for a target that has no smaller sibling: its own first layers, untrained.

python -m benchmarks.first_layers MODEL NUM_LAYERS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(model: str, num_layers: str, out: str) -> None:
    """Writes the draft model, with the target's embedding, head and tokenizer."""
    Path(out).mkdir(parents=True)
    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = int(num_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto").save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
