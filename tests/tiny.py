"""A Llama model of a few thousand numbers with a tokenizer and a chat template, and data sets of a few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = (
    "the a patient doctor has pain in head arm since day week and takes drug no fever cough what should i do "
    "rest drink water call ask more help please yes you may it is not serious"
).split()


def sentence(number: int, words: int) -> str:
    """A sentence of `words` words that depends on `number` alone."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words))


def make_tokenizer(folder: str | Path) -> Any:
    """Write and return a tokenizer of WORDS that renders chats."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[4:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: str | Path, tied: bool = False, seed: int = 0, **config) -> Path:
    """Write a float32 Llama (hidden 32, 2 layers) with its tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def text_rows(n: int = 24) -> list[dict]:
    return [{"text": sentence(i, 5 + i % 9)} for i in range(n)]


def chat_rows(n: int = 24) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(i, 4 + i % 5)},
                {"role": "assistant", "content": sentence(i + 3, 3 + i % 7)},
            ]
        }
        for i in range(n)
    ]


def prompt_rows(n: int = 24) -> list[dict]:
    return [{"prompt": sentence(i, 4 + i % 5), "completion": " " + sentence(i + 1, 3 + i % 6)} for i in range(n)]


def dataset(rows: list[dict]):
    """Rows as a `datasets.Dataset` in memory."""
    from datasets import Dataset

    return Dataset.from_list(rows)
