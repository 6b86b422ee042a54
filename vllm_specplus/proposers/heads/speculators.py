"""MTP heads of the `speculators` library (0.9, model type "mtp", verifiers of type qwen3).

It stores one layer, `mtp_layers.0`, which it unrolls with each step's hidden state fed to the next:
in our words a tied module with `hidden_state_from="previous"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vllm_specplus.errors import bad_option, not_built

_NAMES = {
    "input_proj.weight": "eh_proj.weight",
    "token_layernorm.weight": "enorm.weight",
    "hidden_layernorm.weight": "hnorm.weight",
    "final_layernorm.weight": "final_norm.weight",
    **{
        f"{name}.weight": f"{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "self_attn.o_proj",
            "mlp.down_proj",
        )
    },
}
_MERGED = {
    "self_attn.qkv_proj.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "mlp.gate_up_proj.weight": [f"mlp.{part}_proj.weight" for part in ("gate", "up")],
}
_PREFIX = "mtp_layers.0."
_SHARED = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight")
"""The target's own, which older files carry."""


def is_one(fields: Mapping[str, Any]) -> bool:
    """Whether this config.json is of that format."""
    return fields.get("speculators_model_type") == "mtp"


def convert(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The same heads as fields and tensors of ours; raises what the user can mend."""
    layer = fields.get("transformer_layer_config", {})
    if layer.get("model_type") != "qwen3":
        raise not_built(
            "heads",
            layer.get("model_type"),
            "is a speculators MTP layer of a kind that cannot be imported",
            "kinds that can: qwen3",
        )
    config = fields.get("speculators_config", {})
    try:
        steps = config["proposal_methods"][0]["speculative_tokens"]
        theta = layer.get("rope_theta") or layer["rope_parameters"]["rope_theta"]
        sizes = {name: layer[name] for name in _SIZES}
        stored = {
            name.removeprefix(_PREFIX): t for name, t in tensors.items() if name not in _SHARED
        }
        ours = {new: stored.pop(old) for old, new in _NAMES.items()}
        for new, parts in _MERGED.items():
            ours[new] = torch.cat([stored.pop(part) for part in parts])
    except (KeyError, IndexError, TypeError) as error:
        raise bad_option(
            "heads", "speculators", f"lack {error} of their format", "export them again"
        ) from None
    target = str(config.get("verifier", {}).get("name_or_path", "unknown"))
    about = {
        "target": target,
        "num_modules": steps,
        "tied": True,
        "hidden_state_from": "previous",
        "rope_theta": theta,
        "qk_norm": True,
        "training": {"format": "speculators mtp"},
    }
    return sizes | about, {f"mtp.0.{name}": t for name, t in (ours | stored).items()}


_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
)
