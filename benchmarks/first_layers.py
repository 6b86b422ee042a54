"""A draft model for a target that has no smaller sibling: its own first layers, untrained.

python -m benchmarks.first_layers MODEL NUM_LAYERS OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(model: str, num_layers: int, out: Path) -> None:
    """Writes the draft model, with the target's embedding, head and tokenizer, for use here: the
    target's licence goes with it."""
    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    if not 0 < num_layers < text.num_hidden_layers:
        raise ValueError(f"{num_layers} layers: {model} has {text.num_hidden_layers}, take fewer")
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    draft = AutoModelForCausalLM.from_pretrained(model, config=config, dtype="auto")
    draft.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
