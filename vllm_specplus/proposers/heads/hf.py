"""A heads checkpoint as the config of a draft model, for vLLM's own loader."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from vllm_specplus.errors import bad_option
from vllm_specplus.proposers.heads.checkpoint import HeadsConfig, load_heads

MOST_DEPTHS = 64
_SHARED = (
    "architectures",
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class HeadsModelConfig(PretrainedConfig):
    """`HeadsConfig` as a config of the transformers library."""

    model_type = "specplus_mtp"

    def __init__(self, **fields: Any) -> None:
        known = HeadsConfig.model_fields.keys() - {"model_type"}
        self.heads = {name: fields.pop(name) for name in known & fields.keys()}
        super().__init__(**fields)
        for name in _SHARED:
            setattr(self, name, self.heads.get(name))
        self.model_type = "mtp"  # what vLLM takes it for
        # Where vLLM counts modules: every depth has keys and values of its own.
        self.num_nextn_predict_layers = MOST_DEPTHS


AutoConfig.register(HeadsModelConfig.model_type, HeadsModelConfig, exist_ok=True)


def check_loads(path: str, revision: str | None = None) -> None:
    """Raises OptionError for heads that cannot be loaded or that vLLM would not know for heads."""
    if load_heads(path, revision).config.vocab_size is None:
        raise bad_option(
            "heads",
            path,
            "do not say in our format what vocab_size they are for, and the V2 runner asks",
            "add it to their config.json, or train heads with `vllm-specplus train mtp3`",
        )
    for word in ("eagle-", "eagle3", "dflash", "dspark"):
        if word in path.lower():
            reason = f"have {word!r} in their name, by which vLLM takes them for something else"
            raise bad_option("heads", path, reason, "rename the folder")
