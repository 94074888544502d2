"""Tiny models with random weights of many families, made by one rule, and what `Policy` is to make of them.

python tests/architectures.py        # writes the table of docs/guides/models.md anew
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # sharp distributions: what is wrong shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # windows, states, compressed attention
    "sliding_window": 4,
    "mamba_chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MLA = {"num_key_value_heads": 4}  # attention over compressed keys
ONE_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
ONE_RECURRENCE = {"layer_types": ["linear_attention", "full_attention"]}
HEAD = "a layer in front of its head: `chunked_head: false` trains it"
BOTH_WAYS = "sees what comes behind: no causal LM"

CHANGES = "a forward pass changes its weights"

# model type: (outcome, further settings); a refusal's reason is behind a colon
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("padded", {}),
    "apertus": ("packed", {}),
    "arcee": ("packed", {}),
    "bamba": ("padded", {}),
    "bert": (f"refused: {HEAD}", {"is_decoder": True}),
    "bert-generation": (f"refused: {BOTH_WAYS}", {}),
    "biogpt": ("packed", {}),
    "bitnet": ("packed", {}),
    "bloom": ("padded", {}),
    "cohere": ("packed", {}),
    "cohere2": ("padded", {}),
    "deepseek_v2": ("packed", MLA),
    "deepseek_v3": ("packed", MLA),
    "diffllama": ("packed", {"attention_dropout": 0.0}),
    "doge": ("padded", {}),
    "ernie4_5": ("packed", {}),
    "ernie4_5_moe": ("packed", {}),
    "exaone4": ("padded", {}),
    "falcon": ("padded", {}),
    "falcon_h1": ("padded", {"lm_head_multiplier": 0.3}),
    "falcon_mamba": ("padded", {}),
    "flex_olmo": ("packed", {}),
    "gemma": ("packed", {}),
    "gemma2": ("padded", {}),
    "gemma3_text": ("padded", {}),
    "glm": ("packed", {}),
    "glm4": ("packed", {}),
    "glm4_moe": ("packed", {}),
    "gpt2": ("packed", {}),
    "gpt_bigcode": ("packed", {}),
    "gpt_neox": ("packed", {}),
    "gpt_oss": ("padded", {}),
    "granite": ("packed", {"logits_scaling": 4.0}),
    "granitemoe": ("packed", {"logits_scaling": 4.0}),
    "granitemoehybrid": ("padded", {}),
    "helium": ("packed", {}),
    "hunyuan_v1_dense": ("packed", {}),
    "hunyuan_v1_moe": ("packed", {}),
    "hyperclovax": ("packed", {"logits_scaling": 4.0}),
    "jamba": ("padded", {}),
    "jetmoe": ("packed", {}),
    "lfm2": ("padded", ONE_CONVOLUTION),
    "llama": ("packed", {}),
    "llama4_text": ("padded", {"attention_chunk_size": 4}),
    "mamba": ("padded", {}),
    "minicpm3": ("packed", MLA),
    "minimax": ("padded", {}),
    "minimax_m2": ("packed", {}),
    "mistral": ("padded", {}),
    "mixtral": ("packed", {"sliding_window": None}),
    "modernbert-decoder": (f"refused: {HEAD}", {}),
    "mpt": ("padded", {}),
    "nanochat": ("packed", {}),
    "nemotron": ("padded", {}),
    "olmo": ("packed", {}),
    "olmo2": ("packed", {}),
    "olmo3": ("padded", {}),
    "olmoe": ("packed", {}),
    "opt": ("packed", {"word_embed_proj_dim": 64}),
    "persimmon": ("packed", {}),
    "phi": ("packed", {}),
    "phi3": ("packed", {"sliding_window": None}),
    "phimoe": ("packed", {"sliding_window": None}),
    "qwen2": ("packed", {}),
    "qwen2_moe": ("packed", {}),
    "qwen3": ("packed", {}),
    "qwen3_5_text": ("padded", ONE_RECURRENCE),
    "qwen3_moe": ("packed", {}),
    "qwen3_next": ("padded", ONE_RECURRENCE),
    "recurrent_gemma": ("padded", {"logits_soft_cap": 2.0}),
    "roberta": (f"refused: {BOTH_WAYS}", {}),
    "rwkv": (f"refused: {CHANGES}", {}),
    "seed_oss": ("packed", {}),
    "smollm3": ("packed", {}),
    "stablelm": ("padded", {}),
    "starcoder2": ("packed", {"sliding_window": None}),
    "xglm": ("padded", {}),
    "xlstm": ("padded", {"output_logit_soft_cap": 2.0}),
}


# experts as vLLM on a CPU samples them behind updates; tests/test_agreement.py
MIXTURES = {
    "ernie4_5_moe": "agrees",
    "glm4_moe": "agrees",
    "gpt_oss": "refused",
    "granitemoe": "agrees",
    "mixtral": "agrees",
    "olmoe": "agrees",
    "qwen2_moe": "agrees",
    "qwen3_moe": "agrees",
}


def make(family: str, **more: Any) -> PreTrainedModel:
    """With every kind of dropout and noise that its configuration knows switched on."""
    default = AutoConfig.for_model(family)
    known = {*vars(default), *getattr(default, "attribute_map", {})}
    settings = {key: value for key, value in COMMON.items() if key in known}
    settings |= {key: 0.1 for key in known if ("drop" in key or "jitter" in key) and "classifier" not in key}
    settings |= FAMILIES[family][1] | more
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zero in a new model, and a lost one would not show
            buffer.copy_(torch.randn_like(buffer))
    return model


def table() -> str:
    """For docs/guides/models.md."""
    by_outcome: dict[str, list[str]] = {}
    for family, (outcome, _) in FAMILIES.items():
        by_outcome.setdefault(outcome, []).append(family)
    words = {"packed": "right, in packs", "padded": "right, with padding"}
    lines = [f"| outcome | families ({len(FAMILIES)}) |", "| --- | --- |"]
    for outcome in sorted(by_outcome):
        lines.append(f"| {words.get(outcome, outcome)} | {', '.join(by_outcome[outcome])} |")
    for outcome, words in (("agrees", "agree with vLLM behind updates"), ("refused", "not: vLLM keeps old weights")):
        names = [family for family, found in MIXTURES.items() if found == outcome]
        lines.append(f"| mixtures of experts: {words} | {', '.join(names)} |")
    return "\n".join(lines)


START, END = "<!-- tests/architectures.py -->\n", "\n<!-- end -->"

if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "guides" / "models.md"
    text = page.read_text(encoding="utf-8")
    if START not in text or END not in text:
        sys.exit(f"{page} lacks {START.strip()} or {END.strip()}")
    before, _, rest = text.partition(START)
    page.write_text(before + START + table() + END + rest.partition(END)[2], encoding="utf-8")
