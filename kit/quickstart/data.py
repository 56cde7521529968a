"""The quickstart's own world: letters and their order, in plain sentences and in chats, and a tokenizer to read them.

A base model learns the order of the alphabet from plain sentences; a LoRA then teaches it to answer a question and
stop. The answer is one letter, so exact match is an objective measure. Everything is made from a seed, with no
download. Needs the standard library alone, and `tokenizers` for the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random

SEED = 0
SENTENCES = 20_000
TRAIN_ROWS = 1_500
HELDOUT_ROWS = 300
VOCAB_SIZE = 360
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

PAD, BOS, EOS, END_OF_TURN = "<|pad|>", "<|begin|>", "<|end|>", "<|end_of_turn|>"
# Chat tokens are in the base's vocabulary from the start: new embedding rows would have to travel with the adapter.
SPECIAL_TOKENS = (PAD, BOS, EOS, END_OF_TURN, "<|system|>", "<|user|>", "<|assistant|>")

# EOS ends a plain document and a reply alike, and stands inside the generation marks, so that the loss on the
# assistant's tokens teaches the stop. The space before the content keeps letters the one token (" B") they are in
# running text; " B" and "B" are two tokens, and the base has never read the second.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user'] -%}
{{- '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end_of_turn|>' -}}
{%- else -%}
{{- raise_exception('the roles are system, user and assistant; found ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

MODEL_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(EOS),
    "dtype": "float32",
}

# {some}: the letters in any order, {order}: the same sorted. Several phrasings, because with a single one the base
# ties the comparison to fixed positions, and a question that is worded otherwise finds nothing to build on.
SENTENCE_FORMS = (
    "In the alphabet the first of {some} is {first}.",
    "Of {some}, the one that comes first is {first} and the last is {last}.",
    "The letters {some} in order: {order}.",
    "Sorting {some} gives {order}.",
    "Here are {some}. The first is {first}, then {second}.",
    "Which of {some} is first? It is {first}.",
)
PAIR_FORMS = (
    "The letter {first} comes before {last} in the alphabet.",
    "The letter {last} comes after {first} in the alphabet.",
    "Of {some}, the first is {first}.",
)
QUESTION_FORMS = (
    "Which of {some} comes first in the alphabet?",
    "Here are the letters {some}. Which is the first in the alphabet?",
    "Of the letters {some}, which one is first?",
)


def letter_sets(seed: int = SEED) -> tuple[list[str], list[str]]:
    """Split all sets of four letters into (training, held out); each set is its sorted letters, as in "BDKQ"."""
    sets = ["".join(letters) for letters in combinations(ALPHABET, 4)]
    Random(f"letter sets {seed}").shuffle(sets)
    cut = len(sets) // 10
    return sets[cut:], sets[:cut]


def make_corpus(seed: int = SEED, n: int = SENTENCES) -> list[str]:
    """Make `n` plain sentences about the order of letters; none lists a held-out set of four."""
    random = Random(f"corpus {seed}")
    training, _ = letter_sets(seed)
    sentences = []
    for _ in range(n):
        size = random.choices((2, 3, 4, 5), (2, 2, 5, 1))[0]
        letters = random.choice(training) if size == 4 else "".join(random.sample(ALPHABET, size))
        forms = PAIR_FORMS if size == 2 else SENTENCE_FORMS
        sentences.append(_fill_form(random.choice(forms), letters, random))
    return sentences


def make_chat_rows(seed: int = SEED, n: int = TRAIN_ROWS) -> list[dict[str, list[dict[str, str]]]]:
    """Make `n` training chats, each on a training set of its own: {"messages": [user, assistant]}."""
    training, _ = letter_sets(seed)
    return _make_chats(Random(f"chat {seed}"), training, n)


def make_heldout_rows(seed: int = SEED, n: int = HELDOUT_ROWS) -> list[dict[str, list[dict[str, str]]]]:
    """Make `n` held-out chats, whose letter sets are in no training chat and no four-letter sentence of the corpus."""
    _, heldout = letter_sets(seed)
    return _make_chats(Random(f"held out {seed}"), heldout, n)


def train_tokenizer(texts: Sequence[str], folder: Path) -> None:
    """Train a byte-level BPE of at most VOCAB_SIZE tokens and write it as a Hugging Face fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (PAD, BOS, EOS)],
            "clean_up_tokenization_spaces": False,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "padding_side": "right",
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_base_inputs(folder: Path, seed: int = SEED) -> None:
    """Write what the base is trained from: `folder`/corpus.jsonl, and `folder`/init with tokenizer and config.json."""
    texts = make_corpus(seed)
    init = folder / "init"
    train_tokenizer([*texts, *(row["messages"][0]["content"] for row in make_chat_rows(seed))], init)
    _write_json(init / "config.json", MODEL_CONFIG)
    _write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in texts])


def write_chats(folder: Path, seed: int = SEED) -> None:
    """Write letters_train.jsonl and letters_heldout.jsonl, as they stand in recipes/data for seed 0."""
    _write_jsonl(folder / "letters_train.jsonl", make_chat_rows(seed))
    _write_jsonl(folder / "letters_heldout.jsonl", make_heldout_rows(seed))


def _make_chats(random: Random, sets: list[str], n: int) -> list[dict[str, list[dict[str, str]]]]:
    rows = []
    for letters in random.sample(sets, n):  # unsorted: the first k rows are a fair sample
        question = _fill_form(random.choice(QUESTION_FORMS), letters, random)
        rows.append(
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": min(letters)}]}
        )
    return rows


def _fill_form(form: str, letters: str, random: Random) -> str:
    """Put a set of letters into a form, listed in a random order."""
    order = sorted(letters)
    some = random.sample(order, len(order))
    lists = (", ".join(some), ", ".join(some[:-1]) + " and " + some[-1], " ".join(some))
    return form.format(
        some=random.choice(lists), order=" ".join(order), first=order[0], second=order[1], last=order[-1]
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_jsonl(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
