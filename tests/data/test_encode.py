"""One encoding: `encode_rows` gives what SFTTrainer prepares, on every chat template that TRL ships.

Where the two part on purpose, a test here says so.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from kit.data.encode import IGNORED, EncodedRow, Encoding, encode_prompt, encode_row, encode_rows, make_encoding
from kit.data.templates import run_template
from kit.evaluation.examples import example_from_row, tokenize_example
from kit.rows.formats import resolve_train_on
from kit.rows.turns import RowProblem

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


@cache
def make_core(special: tuple[str, ...]) -> str:
    """A tokenizer of bytes and of the special tokens given, as JSON."""
    vocabulary = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    return core.to_str()


def make_tokenizer(template: str, bos: str | None, eos: str, closing: str = "") -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that a template writes; `closing` is what the tokenizer itself adds to a text."""
    core = Tokenizer.from_str(
        make_core(tuple(sorted({"<|pad|>", eos, *([bos] if bos else []), *re.findall(SPECIAL, template)})))
    )
    if closing:
        names = [name for name in (bos, eos) if name and name in closing]
        tokens = [(name, core.token_to_id(name)) for name in names]
        core.post_processor = processors.TemplateProcessing(single=closing, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template or None
    return tokenizer


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with TRL's template of that name."""
    return make_tokenizer(TEMPLATES[name], *ENDS[max((n for n in ENDS if name.startswith(n)), key=len)])


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


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes))


def prepare(tokenizer: Any, model: Any, folder: Path, rows: list[dict], **settings: Any) -> list[tuple[list, list]]:
    """(ids, labels) of rows as SFTTrainer prepares them. A stream spares writing each step of the same work."""
    args = SFTConfig(str(folder), report_to=[], use_cpu=True, bf16=False, max_steps=1, **settings)
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def encoding_of(tokenizer: Any, row: dict, **settings: Any) -> Encoding:
    """What a plan with these settings of the trainer encodes with."""
    only = settings.get("assistant_only_loss", False)
    kind = "prompt_completion" if "prompt" in row else "messages" if "messages" in row else "text"
    train_on, answers_only = resolve_train_on(None, only, settings.get("completion_only_loss"), kind)
    template = run_template(tokenizer, only, None)
    lengths = {key: settings[key] for key in ("max_length", "truncation_mode") if key in settings}
    return make_encoding(tokenizer, template, train_on=train_on, answers_only=answers_only, **lengths)


def compare(tokenizer: Any, model: Any, folder: Path, rows: dict[str, dict], **settings: Any) -> dict[str, str]:
    """Compare our encoding of rows with SFTTrainer's; {row: why} of those that we refuse."""
    settings = {"max_length": None} | settings
    encoding = encoding_of(tokenizer, next(iter(rows.values())), **settings)
    made = dict(zip(rows, encode_rows(tokenizer, list(rows.values()), encoding), strict=True))
    refused = {name: str(found) for name, found in made.items() if isinstance(found, RowProblem)}
    kept = [name for name in rows if name not in refused]
    theirs = prepare(tokenizer, model, folder, [rows[name] for name in kept], **settings) if kept else []
    for name, (ids, labels) in zip(kept, theirs, strict=True):
        piece: EncodedRow = made[name][0]
        assert piece.input_ids == ids, name
        assert piece.labels == labels, name
    return refused


NO_PARTS = r"idefics3|smolvlm|llava_next"  # for images: they read lists of parts, and leave text out
# (templates, rows, why we refuse them)
REFUSED = [
    (r"cohere|gemma3?", "tools", "Conversation roles must alternate"),
    (r"gemma", "system", "System role not supported"),
    (NO_PARTS, "tools", "str object has no element 0"),
    (r"llava_next", ".*", "'str object' has no attribute 'text'"),
    # TRL trains these without a word
    (r"idefics3|smolvlm", ".*", "leaves out the text of turn 1"),
    (r"cohere2|lfm2|llama3|phi3(_5)?|qwen2_5_vl", "tools", "leaves out the calls of tools"),
]
NO_TWIN = r"gemma4.*|llama3_[12]"  # without marks, and TRL has no template of its own for them: it refuses
AS_TEXT = r"deepseek.*"  # they want a call's arguments as JSON text: TRL hands over the object


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not name.endswith("_training")])
def test_rows_are_encoded_as_sft_trainer_encodes_them(name: str, model: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name)
    chats = CHATS | TOOLS
    if re.fullmatch(AS_TEXT, name):
        del chats["tools"]
        ours = encode_row(tokenizer, TOOLS["tools"], encoding_of(tokenizer, TOOLS["tools"]))
        assert '{"a": 1, "b": 2}' in tokenizer.decode(ours.input_ids)
    for rows in (chats, COMPLETIONS):
        for only in (False, True):
            if only and re.fullmatch(NO_TWIN, name):
                with pytest.raises(ValueError, match="not training-compatible"):
                    prepare(tokenizer, model, tmp_path, [CHATS["one turn"]], assistant_only_loss=True)
                continue
            refused = compare(tokenizer, model, tmp_path, rows, assistant_only_loss=only)
            for row in rows:
                told = [why for names, which, why in REFUSED if re.fullmatch(names, name) and re.fullmatch(which, row)]
                assert any(why in refused[row] for why in told) if row in refused else not told, (row, refused)


def test_the_refused_rows_are_lost_or_refused_by_sft_trainer_too(model: Any, tmp_path: Path) -> None:
    for name, row in [("cohere", "tools"), ("gemma", "system"), ("idefics3", "tools"), ("llava_next", "one turn")]:
        with pytest.raises(Exception, match="Conversation roles|System role|has no"):
            prepare(tokenizer_of(name), model, tmp_path, [(CHATS | TOOLS)[row]], max_length=None)
    for name, row, text in [("idefics3", "one turn", "Is it?"), ("phi3", "tools", "add"), ("llama3", "tools", "add")]:
        ((ids, _),) = prepare(tokenizer_of(name), model, tmp_path, [(CHATS | TOOLS)[row]], max_length=None)
        assert text not in tokenizer_of(name).decode(ids)


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
        (pairs[:1], {"completion_only_loss": True, "max_length": 9}),
    ]:
        assert compare(tokenizer, model, tmp_path, {str(n): row for n, row in enumerate(rows)}, **settings) == {}
    whole = encode_row(tokenizer, texts[0], encoding_of(tokenizer, texts[0], assistant_only_loss=True))
    assert whole.trained == len(whole.input_ids)  # beside chats in a mix; alone the check refuses it
    with pytest.raises(ValueError, match="not conversational"):
        prepare(tokenizer, model, tmp_path, texts, assistant_only_loss=True)


def test_one_bos_begins_a_text_where_the_settings_say_so(model: Any, tmp_path: Path) -> None:
    """SFTTrainer leaves both as they are."""
    row = {"text": "<s>hello"}
    twice = make_tokenizer("", "<s>", "</s>", "<s> $A")
    ours, theirs = encode_row(twice, row, Encoding()), prepare(twice, model, tmp_path, [row])[0][0]
    assert [twice.bos_token_id, *ours.input_ids] == theirs and ours.notes == ("second BOS taken off",)
    never = make_tokenizer("", "<s>", "</s>")
    never._add_bos_token = True  # as DeepSeek V3 says of itself
    row = {"prompt": "hello", "completion": " there"}
    ours = encode_row(never, row, Encoding(train_on="completion"))
    never._add_bos_token = False
    ((ids, labels),) = prepare(never, model, tmp_path, [row])
    assert (ours.input_ids, ours.labels) == ([never.bos_token_id, *ids], [IGNORED, *labels])
    assert ours.notes == ("BOS put in front",)


def test_settings_cut_and_mask_as_sft_trainer_does(model: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen2_5")
    for rows, settings in [
        (CHATS, {"max_length": 60}),
        (CHATS, {"completion_only_loss": True}),  # has no meaning for whole chats
        (COMPLETIONS, {"max_length": 200}),
        (COMPLETIONS, {"max_length": 30, "truncation_mode": "keep_end"}),
        (COMPLETIONS, {"completion_only_loss": False}),
        (COMPLETIONS, {"completion_only_loss": False, "assistant_only_loss": True, "max_length": 200}),
    ]:
        assert compare(tokenizer, model, tmp_path, rows, **settings) == {}
    # a row that is cut to its prompt is left out there without a word
    encoding = encoding_of(tokenizer, COMPLETIONS["one turn"], max_length=20)
    made = encode_rows(tokenizer, list(COMPLETIONS.values()), encoding)
    assert all(isinstance(row, RowProblem) and "no trained token is left" in str(row) for row in made)
    assert prepare(tokenizer, model, tmp_path, list(COMPLETIONS.values()), max_length=20) == []


def test_a_chat_without_an_answer_is_refused_where_only_answers_count(model: Any, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen2_5")
    rows = {"question": {"messages": turns("Is it?")}, "answered": CHATS["one turn"]}
    refused = compare(tokenizer, model, tmp_path, rows, assistant_only_loss=True)
    assert list(refused) == ["question"] and "no turn to train" in refused["question"]
    with pytest.raises(RuntimeError, match="no assistant tokens"):
        prepare(tokenizer, model, tmp_path, [rows["question"]], assistant_only_loss=True)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_r1_distill", "lfm2_v2"])
def test_evaluation_tokenizes_a_chat_as_training_does(name: str) -> None:
    tokenizer = tokenizer_of(name)
    prompted = make_encoding(tokenizer)
    encodings = [prompted, *([make_encoding(tokenizer, run_template(tokenizer, True, None))] * (name != "llama3_1"))]
    for encoding in encodings:
        for case, row in (CHATS | TOOLS).items():
            if case == "user last":
                continue  # evaluation scores the last answer, what follows it is no part of that
            trained = encode_row(tokenizer, row, encoding)
            example = example_from_row(row, 0)
            scored = tokenize_example(tokenizer, example, (), encoding, prompted)
            assert scored.input_ids == trained.input_ids, case
            answer = row["messages"][-1]["content"].rpartition("</think>")[2].strip()
            assert answer in tokenizer.decode(scored.answer_ids)
            asked = encode_prompt(tokenizer, row["messages"][:-1], chat=True, row=row, encoding=prompted)
            assert scored.prompt_ids == asked  # generation is asked in the tokenizer's own template
    if name == "qwen3":  # TRL's template for assistant_only_loss keeps earlier thoughts, the model's own drops them
        own, replaced = (encode_row(tokenizer, CHATS["thinking"], encoding) for encoding in encodings)
        assert len(own.input_ids) < len(replaced.input_ids) and own.notes == ("reasoning left out",)
