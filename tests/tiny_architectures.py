"""Tiny models of many architectures, by what becomes of documents that are packed into one row."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "initializer_range": 0.1, "sliding_window": 16,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {"query_pre_attn_scalar": 8, "num_hidden_layers": 6}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 32}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "num_hidden_layers": 4}  # fmt: skip

APART = {
    "llama": {}, "qwen3": {}, "mistral": {}, "gemma2": GEMMA, "gemma3_text": GEMMA, "gpt2": GPT2, "gpt_neox": {},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "phi3": {}, "olmo2": {}, "granite": {}, "cohere": {}, "smollm3": {},
}  # fmt: skip
EAGER_ONLY = ("gemma2",)
WITHOUT_SDPA = {  # sdpa cannot compute them: capped logits, sinks, or windows of their own
    "gemma2": GEMMA, "gpt_oss": EXPERTS, "vaultgemma": GEMMA, "granite_swa": {}, "granitemoe_swa": EXPERTS,
    "flint": {}, "hy_v4": {}, "mimo_v2_flash": EXPERTS,
}  # fmt: skip
LEAKING = {  # the rows up to mpt make the mask without positions, those below carry a state along the row
    "gpt_oss": EXPERTS, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4},
    "afmoe": {**EXPERTS, "num_dense_layers": 1}, "biogpt": {}, "falcon": {},
    "granitemoehybrid": {**STATE, **EXPERTS, "layer_types": ["attention"] * 2, "shared_intermediate_size": 16},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8}, "minimax": EXPERTS, "rwkv": {},
    "jamba": {**EXPERTS, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 16},
}  # fmt: skip
REFUSING = {  # transformers refuses packed rows itself where causal-conv1d is not installed
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}, "qwen3_5_text": LINEAR,
    "falcon_h1": {**STATE, "mamba_d_ssm": 64}, "bamba": {**STATE, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {**STATE, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
}  # fmt: skip


def model_of(kind: str, attention: str = "eager", **changes: Any) -> Any:
    """A causal model with random weights, the same at each call."""
    torch.manual_seed(0)
    unknown = {"rwkv": "intermediate_size", "falcon": "head_dim"}.get(kind)
    settings = {k: v for k, v in SIZES.items() if k != unknown}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**settings, **changes}), attn_implementation=attention
    )
