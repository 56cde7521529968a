"""The tiny twin of a recipe's base: its own config with small numbers, random weights, a small tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TEMPLATE

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64,
    "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32,
    "ffn_dim": 128, "word_embed_proj_dim": 64,  # OPT
    "n_embd": 64, "n_layer": 2, "n_head": 4,  # GPT-2
}  # fmt: skip
MARKS = ["<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(folder: Path, pad_token: str | None) -> Any:
    """Byte-level BPE with 512 tokens; `pad_token` is the one that the recipe names, its own is <pad>."""
    import source_data
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<unk>", *MARKS, *([pad_token] if pad_token else [])]))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [turn["content"] for row in source_data.chat_rows(100) for turn in row["messages"]]
    raw.train_from_iterator(texts, trainer)
    own = {} if pad_token else {"pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=MARKS, **own,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_twin(folder: Path, config: dict[str, Any], pad_token: str | None) -> Path:
    """Write the twin of a preset's `config` into `folder`: the same architecture, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder, pad_token)
    shape = {**config, **{k: v for k, v in SMALL.items() if config.get(k) is not None}}
    # Not in every preset, since their defaults are the real model's: what follows from the width must shrink with it.
    derived = {"gemma2": ("head_dim", "query_pre_attn_scalar"), "glm4": ("head_dim",), "opt": ("ffn_dim",)}
    shape |= {k: SMALL[k] for k in derived.get(config["model_type"], ())}
    kind = shape.pop("model_type")
    ids = {"pad_token_id": 0, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **ids}), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder
