"""One encoding: `encode_row` gives what SFTTrainer prepares, on every chat template that TRL ships."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from kit.data.encode import (
    IGNORED,
    EncodedRow,
    encode_prompt,
    encode_row,
    template_arguments,
    training_chat_template,
)
from kit.errors import KitError
from kit.evaluation.examples import example_from_row, tokenize_example

TEMPLATES = {f.stem: f.read_text() for f in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
SPECIAL = r"<\|?/?[A-Za-z_0-9]+\|?>|<｜[^｜<>]+｜>|\[/?[A-Z_]+\]"
# (bos, eos) of the models that a template belongs to, by the beginning of its name; the longest beginning counts
ENDS = {
    "": (None, "<|endoftext|>"),
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<turn|>"),
    "gemma": ("<bos>", "<eos>"),
    "gemma4": ("<bos>", "<turn|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava": ("<s>", "</s>"),
    "muse": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}


def make_tokenizer(template: str, bos: str | None, eos: str, closing: str = "") -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that a template writes; `closing` is what the tokenizer itself adds to a text."""
    vocabulary = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = sorted({"<|pad|>", eos, *([bos] if bos else []), *re.findall(SPECIAL, template)})
    core.add_special_tokens(special)
    if closing:
        names = [name for name in (bos, eos) if name and name in closing]
        tokens = [(name, core.token_to_id(name)) for name in names]
        core.post_processor = processors.TemplateProcessing(single=closing, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template or None
    return tokenizer


def turns(*contents: str, system: str | None = None) -> list[dict]:
    lead = [{"role": "system", "content": system}] if system else []
    return lead + [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CHATS = {
    "one turn": {"messages": turns("Is it?", "yes")},
    "turns": {"messages": turns("First", "a long first answer ", "Then?", " maybe so\n")},
    "system": {"messages": turns("And this?", "yes", system="Answer briefly.")},
    "thinking": {"messages": turns("1+1?", "<think>\nadd\n</think>\n\n2", "And 3?", "<think>\nadd\n</think>\n\n5")},
    "user last": {"messages": turns("Is it?", "yes", "Sure?")},
}
TOOLS = {
    "tools": {
        "messages": [
            *turns("1+2?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "content": "3"},
            {"role": "assistant", "content": "3"},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "tools unused": {
        "messages": turns("Is it?", "yes"),
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    # Llama 3.1 and others write their lines about tools for an empty list too, and TRL passes it on
    "no tools": {
        "messages": turns("Is it?", "yes"),
        "tools": [],
        "chat_template_kwargs": {"enable_thinking": False},
    },
}
COMPLETIONS = {
    name: {"prompt": row["messages"][:split], "completion": row["messages"][split:]}
    for name, row, split in [
        ("one turn", CHATS["one turn"], 1),
        ("turns", CHATS["turns"], 3),
        ("system", CHATS["system"], 2),
        ("thinking", CHATS["thinking"], 3),
        ("several answers", CHATS["turns"], 1),
    ]
}


# (templates, "kind of row: row", why upstream and we refuse it); all else is encoded
REFUSED = [
    (r"(cohere2?|gemma3?)(_training)?", r"chat: tools", "Conversation roles must alternate"),
    (r"gemma(_training)?", r".*: system", "System role not supported"),
    (r"deepseekv3", r"chat: tools", "can only concatenate str"),  # it wants a call's arguments as JSON text
    (r"gemma4.*|llama3_[12]", r".* assistant only: .*", "not training-compatible"),  # no marks, and TRL has none
    (r"(idefics3|smolvlm)(_training)?", r"chat: tools", "str object has no element 0"),
    (r"llava_next(_training)?", r".*", "str object"),  # for images: it reads a list of parts, never text
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))


def prepare(tokenizer: Any, model: Any, folder: Path, rows: list[dict], streaming: bool, **settings: Any) -> Any:
    """Return the rows as one batch of SFTTrainer's. A stream spares hashing and writing each step of the same work."""
    args = SFTConfig(str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=1, **settings)
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    return trainer.data_collator([dict(row) for row in trainer.train_dataset])


def compare(
    tokenizer: Any, model: Any, folder: Path, rows: dict[str, dict], *, streaming: bool = True, **settings: Any
) -> dict[str, str]:
    """Compare our encoding of rows with SFTTrainer's; returns {row: reason} for those that both refuse."""
    settings = {"max_length": None} | settings
    names: list[str] = []
    encoded: list[EncodedRow] = []
    refusals: dict[str, KitError] = {}
    arrow = dict(zip(rows, Dataset.from_list(list(rows.values())), strict=True))  # rows as Arrow gives them back
    for name, row in arrow.items():
        try:
            template = training_chat_template(tokenizer, settings.get("assistant_only_loss", False))
            encoded.append(encode_row(tokenizer, row, chat_template=template, **settings))
            names.append(name)
        except KitError as error:
            refusals[name] = error

    for name, error in refusals.items():
        with pytest.raises(Exception) as upstream:  # noqa: PT011 - its type and text are compared
            prepare(tokenizer, model, folder, [arrow[name]], streaming, **settings)
        reason = error.__cause__ or error
        if error.__cause__:
            assert (type(upstream.value), str(upstream.value)) == (type(reason), str(reason))
        else:
            assert "no assistant tokens" in str(upstream.value) and "no assistant tokens" in str(reason)
    if names:
        batch = prepare(tokenizer, model, folder, [arrow[name] for name in names], streaming, **settings)
        if settings["max_length"]:  # SFTTrainer leaves out rows that are cut to their prompt
            encoded = [row for row in encoded if any(label != IGNORED for label in row.labels)]
        assert len(encoded) == len(batch["input_ids"])
        for n, row in enumerate(encoded):
            length = int(batch["attention_mask"][n].sum())
            assert row.input_ids == batch["input_ids"][n][:length].tolist(), names[n]
            assert row.labels == batch["labels"][n][:length].tolist(), names[n]
    return {name: str(error.__cause__ or error) for name, error in refusals.items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_are_encoded_as_sft_trainer_encodes_them(name: str, model: Any, tmp_path: Path) -> None:
    bos, eos = ENDS[max((n for n in ENDS if name.startswith(n)), key=len)]
    tokenizer = make_tokenizer(TEMPLATES[name], bos, eos)
    refused = {
        f"{kind}: {row}": reason
        for kind, rows, settings in [
            ("chat", CHATS, {}),
            ("chat, assistant only", CHATS, {"assistant_only_loss": True}),
            ("chat", TOOLS, {}),
            ("completion", COMPLETIONS, {}),
            ("completion, assistant only", COMPLETIONS, {"assistant_only_loss": True}),
        ]
        for row, reason in compare(tokenizer, model, tmp_path, rows, **settings).items()
    }
    expected = [(case, reason) for templates, case, reason in REFUSED if re.fullmatch(templates, name)]
    for case, reason in refused.items():
        assert any(re.fullmatch(c, case) and r in reason for c, r in expected), (case, reason)
    assert all(any(re.fullmatch(c, case) for case in refused) for c, _ in expected)


@pytest.mark.parametrize("closing", ["", "<s> $A", "$A </s>"], ids=["bare", "adds bos", "adds eos"])
def test_text_is_encoded_as_sft_trainer_encodes_it(closing: str, model: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("", "<s>", "</s>", closing)
    texts = [{"text": t} for t in ("a", "some longer text, with commas", "it ends</s>", " ")]
    pairs = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "one token over the seam: a", "completion": "b c"},
        {"prompt": "it ends ", "completion": "here</s>"},
        {"prompt": "nothing", "completion": ""},
    ]
    for rows, settings in [
        (texts, {}),
        (texts, {"max_length": 8}),
        (texts, {"max_length": 8, "truncation_mode": "keep_end"}),
        (pairs, {}),
        (pairs, {"completion_only_loss": False}),
        (pairs, {"completion_only_loss": True, "max_length": 9}),
    ]:
        named = {str(n): row for n, row in enumerate(rows)}
        assert compare(tokenizer, model, tmp_path, named, **settings) == {}
    with pytest.raises(KitError, match="not chats"):
        encode_row(tokenizer, texts[0], assistant_only_loss=True)
    with pytest.raises(ValueError, match="not conversational"):
        prepare(tokenizer, model, tmp_path, texts, streaming=True, assistant_only_loss=True)


@pytest.mark.parametrize("streaming", [True, False])
def test_settings_cut_and_mask_as_sft_trainer_does(streaming: bool, model: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATES["qwen2_5"], None, "<|im_end|>")
    for rows, settings in [
        (CHATS, {"max_length": 60}),
        (CHATS, {"completion_only_loss": True}),  # has no meaning for whole chats
        (COMPLETIONS, {"max_length": 100}),
        (COMPLETIONS, {"max_length": 30, "truncation_mode": "keep_end"}),
        (COMPLETIONS, {"completion_only_loss": False}),
        (COMPLETIONS, {"completion_only_loss": False, "assistant_only_loss": True, "max_length": 120}),
    ]:
        assert compare(tokenizer, model, tmp_path, rows, streaming=streaming, **settings) == {}


def test_a_chat_without_an_answer_is_refused_where_only_answers_count(model: Any, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(TEMPLATES["qwen2_5_training"], None, "<|im_end|>")
    rows = {"question": {"messages": turns("Is it?")}, "answered": CHATS["one turn"]}
    refused = compare(tokenizer, model, tmp_path, rows, assistant_only_loss=True)
    assert list(refused) == ["question"] and "no assistant tokens" in refused["question"]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_r1_distill", "lfm2"])
def test_evaluation_tokenizes_a_chat_as_training_does(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name], *ENDS[max((n for n in ENDS if name.startswith(n)), key=len)])
    templates = [None, *([training_chat_template(tokenizer, True)] if name != "llama3_1" else [])]
    for template in templates:
        for case, row in (CHATS | TOOLS).items():
            if case == "user last":
                continue  # evaluation scores the last answer, what follows it is no part of that
            trained = encode_row(tokenizer, row, chat_template=template)
            scored = tokenize_example(tokenizer, example_from_row(row, 0), (), template)
            assert scored.input_ids == trained.input_ids, case
            answer = row["messages"][-1]["content"].rpartition("</think>")[2].strip()
            assert answer in tokenizer.decode(scored.answer_ids)
            before = row["messages"][:-1]
            assert scored.prompt_ids == encode_prompt(
                tokenizer, before, chat=True, template=template_arguments(row)
            )  # generation is asked in the tokenizer's own template
    if name == "qwen3":  # TRL's template for assistant_only_loss keeps earlier thoughts, the model's own drops them
        own, replaced = (encode_row(tokenizer, CHATS["thinking"], chat_template=t) for t in templates)
        assert len(own.input_ids) < len(replaced.input_ids)
