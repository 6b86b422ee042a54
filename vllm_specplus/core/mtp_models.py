"""Models with multi-token-prediction (MTP) modules in their own checkpoint, as vLLM serves them.

One row for each of vLLM's MTP model types: where config.json counts the modules, and whose hidden
state the modules after the first were trained on. Module k of DeepSeek-V3 reads the hidden state of
module k-1 (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2); other models give the target's own to
all. Fields and types were read in vLLM 0.32 and 0.33 (`SpeculativeConfig.hf_config_override` and
the model files).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HiddenStateFrom = Literal["previous", "target"]
NEXTN = "num_nextn_predict_layers"
"""The one field that vLLM itself asks whether a model has several modules."""


@dataclass(frozen=True, slots=True)
class MTPModel:
    """One row.

    name: for people. targets: `model_type` or architecture in config.json. field, where: the
    count, in the sub-config of that name for checkpoints that have one. default: the count where
    the field is missing. hidden_state_from: None where no source says it; then it is "previous", as
    vLLM has it for all. source: of that fact. runs: most modules that vLLM's class can run.
    """

    name: str
    targets: tuple[str, ...]
    field: str = NEXTN
    where: str = "text_config"
    default: int = 0
    hidden_state_from: HiddenStateFrom | None = None
    source: str = "unknown: vLLM's own"
    runs: int | None = None

    def count(self, config: Mapping[str, Any]) -> int:
        """Modules in the checkpoint with this config.json."""
        number = (config.get(self.where) or config).get(self.field)
        return self.default if number is None else int(number)

    def chain(self, num_modules: int, depth: int) -> tuple[int, ...]:
        """The module, from 1 on, that drafts each of `depth` tokens: the last one goes on."""
        there = min(num_modules, self.runs or num_modules)
        return tuple(min(step, there) for step in range(1, depth + 1))


def find_mtp_model(config: Mapping[str, Any]) -> MTPModel | None:
    """The row of a config.json, if vLLM knows MTP modules of such models."""
    names = {config.get("model_type"), *(config.get("architectures") or ())}
    return next((row for row in MTP_MODELS.values() if names.intersection(row.targets)), None)


_V3 = "DeepSeek-V3 report, arXiv 2412.19437, section 2.2"
_CHAINED = "SGLang, multi_layer_eagle_worker_v2.py: in `chain_mtp_hidden_states`"
_ONE = "no choice: vLLM's class runs one module"

MTP_MODELS: dict[str, MTPModel] = {
    "deepseek_mtp": MTPModel(
        "DeepSeek-V3, V3.2, V4; GLM-5",
        ("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4"),
        hidden_state_from="previous",
        source=_V3,
    ),
    "dots3_note_mtp": MTPModel("dots3-note", ("dots3_note",), default=1),
    "mimo_mtp": MTPModel("MiMo-7B", ("MiMoForCausalLM",), runs=1, source=_ONE),
    "mimo_v2_mtp": MTPModel(
        "MiMo-V2",
        ("MiMoV2ForCausalLM", "MiMoV2OmniForCausalLM", "MiMoV2FlashForCausalLM"),
        default=1,
        hidden_state_from="target",
        source="SGLang, the same file: runs MiMo-V2, does not chain it",
    ),
    "glm4_moe_mtp": MTPModel("GLM-4.5", ("Glm4MoeForCausalLM",)),
    "glm4_moe_lite_mtp": MTPModel("GLM-4.7-Flash", ("Glm4MoeLiteForCausalLM",)),
    "glm_ocr_mtp": MTPModel("GLM-OCR", ("GlmOcrForConditionalGeneration",)),
    "glm5_next_mtp": MTPModel("GLM-5-Next", ("glm5_next",)),
    "ernie_mtp": MTPModel("ERNIE 4.5", ("ernie4_5_moe",), runs=1, source=_ONE),
    "nemotron_h_mtp": MTPModel(
        "Nemotron-H", ("nemotron_h", "nemotron_h_puzzle"), runs=1, source=_ONE
    ),
    "exaone_moe_mtp": MTPModel("EXAONE-MoE", ("exaone_moe",)),
    "exaone4_5_mtp": MTPModel("EXAONE 4.5", ("exaone4_5",)),
    "qwen3_next_mtp": MTPModel("Qwen3-Next", ("qwen3_next",)),
    "qwen3_5_mtp": MTPModel(
        "Qwen3.5; Intern-S2",
        (
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_text",
            "qwen3_5_moe_text",
            "intern_s2_preview",
            "interns2_mobius",
        ),
        field="mtp_num_hidden_layers",
    ),
    "qwen4_exp_mtp": MTPModel(
        "Qwen4-exp", ("qwen4_exp", "qwen4_exp_text"), field="mtp_num_hidden_layers"
    ),
    "longcat_flash_mtp": MTPModel(
        "LongCat-Flash", ("longcat_flash",), default=1, runs=1, source=_ONE
    ),
    "bailing_hybrid_mtp": MTPModel("Ling 2.5", ("bailing_hybrid", "BailingMoeV2_5ForCausalLM")),
    "bailing_hybrid_v3_mtp": MTPModel(
        "Ling 3", ("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration")
    ),
    "minimax_m3_mtp": MTPModel(
        "MiniMax-M3",
        ("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration"),
        field="num_mtp_modules",
        default=1,
    ),
    "kimi_k3_mtp": MTPModel("Kimi-K3", ("kimi_k3",)),
    "pangu_ultra_moe_mtp": MTPModel("openPangu-Ultra", ("pangu_ultra_moe",)),
    "step3p5_mtp": MTPModel(
        "Step-3.5, 3.7",
        ("step3p5", "step3p7", "Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        default=1,
        hidden_state_from="previous",
        source=_CHAINED,
    ),
    "step5_mtp": MTPModel("Step-5 (vLLM 0.33)", ("step5", "step5_vl"), default=1),
    "hy_v3_mtp": MTPModel("Hunyuan-V3", ("hy_v3",)),
    "hy_v4_mtp": MTPModel("Hunyuan-V4", ("hy_v4",)),
    "inkling_mtp": MTPModel(
        "Inkling",
        ("inkling_mm_model", "inkling_model"),
        where="mtp_config",
        hidden_state_from="previous",
        source=_CHAINED,
    ),
}
"""By vLLM's name of the draft, `SpeculativeConfig.draft_model_config.hf_config.model_type`."""

NOT_MODULES = {
    "mtp": "a spelling of the method; in vLLM 0.33 also Nemotron Parse 3.5, which has one step",
    "gemma4_mtp": "an assistant model with a checkpoint of its own, given as a path",
}
"""The rest of vLLM's MTP model types, and why they have no row."""
