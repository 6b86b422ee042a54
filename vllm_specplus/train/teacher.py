"""The target as the trainer needs it: hidden states, embedding, head, and the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vllm_specplus.errors import not_built
from vllm_specplus.proposers.heads.checkpoint import HeadsConfig, module_shapes


class Teacher:
    """A transformers model without gradients.

    embedding, head: [vocab_size, hidden_size]; norm_gain: float32 [hidden_size], of the final norm;
    embed_scale: factor on rows of the embedding.
    """

    def __init__(self, model: str | Path, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device, self.dtype = str(model), device, dtype
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device).eval()
        whole.requires_grad_(False)
        self.config = whole.config.get_text_config()
        self.decoder = whole.get_decoder()
        embedding, output = whole.get_input_embeddings(), whole.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise not_built(
                "model", self.name, "has no plain output head", "train for one that has it"
            )
        self.embedding: Tensor = embedding.weight
        self.head: Tensor = output.weight
        self.embed_scale = float(getattr(embedding, "embed_scale", 1.0))
        self.layer: nn.Module = self.decoder.layers[-1]
        self.norm_gain, self.norm_adds_one = _gain(self.decoder.norm)

    @torch.inference_mode()
    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states after the final norm, [B, T, hidden_size], of tokens [B, T]."""
        return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled rows of the embedding, [..., hidden_size]."""
        return self.embedding[tokens] * self.embed_scale

    def sizes(self) -> dict[str, Any]:
        """The fields of HeadsConfig for a layer of this target's kind."""
        config, attention = self.config, getattr(self.layer, "self_attn", None)
        heads = config.num_attention_heads
        q_norm = getattr(attention, "q_norm", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return {
            "hidden_size": config.hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": head_dim,
            "intermediate_size": config.intermediate_size,
            "hidden_act": getattr(config, "hidden_activation", None) or config.hidden_act,
            "rope_theta": _rope_theta(config),
            "rms_norm_eps": getattr(config, "rms_norm_eps", 1e-6),
            "norm_adds_one": self.norm_adds_one,
            "sandwich_norms": hasattr(self.layer, "pre_feedforward_layernorm"),
            "qk_norm": q_norm is not None and q_norm.weight.shape == (head_dim,),
            "attention_bias": getattr(getattr(attention, "q_proj", None), "bias", None) is not None,
            "embed_scale": self.embed_scale,
        }

    def last_layer(self, config: HeadsConfig) -> dict[str, Tensor]:
        """The tensors of `module_shapes` that the target's last layer has; none if it is of another
        kind, such as a mixture of experts."""
        own = {name: tensor.float() for name, tensor in self.layer.state_dict().items()}
        merged = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
        for name, parts in merged.items():
            for end in ("weight", "bias"):
                stem = name.rpartition(".")[0]
                rows = [own.get(f"{stem}.{part}_proj.{end}") for part in parts]
                if all(row is not None for row in rows):
                    own[f"{name}.{end}"] = torch.cat(rows)  # type: ignore[arg-type]
        shapes = module_shapes(config)
        fitting = {n: own[n] for n, shape in shapes.items() if n in own and own[n].shape == shape}
        needed = {name for name in shapes if name.startswith(("self_attn.", "mlp."))}
        return fitting if needed <= fitting.keys() else {}


@torch.no_grad()
def _gain(norm: Any) -> tuple[Tensor, bool]:
    """What a norm multiplies with, and whether it stores this less 1 (seen, not known by name)."""
    weight = norm.weight.float()
    seen = norm(torch.ones_like(norm.weight)[None])[0].float()
    adds_one = bool((seen - weight - 1).abs().mean() < (seen - weight).abs().mean())
    return weight + float(adds_one), adds_one


def _rope_theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
