"""Which tokens are trained, against tests/mask_oracle.py: each result is exactly right, or the row is refused."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_oracle import Subject, blank_out, expected_spans, render
from test_encode import ENDS, TEMPLATES, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kit.data.encode import IGNORED, EncodedRow, Encoding, LongRow, encode_rows, end_of_turn_id, make_encoding
from kit.data.masks import chosen_turns, marked_spans
from kit.data.templates import freeze_date, run_template, writes_date
from kit.errors import KitError
from kit.rows.turns import RowProblem

EXAMPLES = int(os.environ.get("MASK_EXAMPLES", "12"))  # chats of each template
LOOP = "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}"
BY_HAND = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set lead = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set lead = '' %}{% endif %}"
        + LOOP
        + "{% set content = lead + m['content'] if loop.index0 == 0 else m['content'] %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "meta": LOOP
    + "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{{ bos_token + content if loop.index0 == 0 else content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "mistral_v3": (
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}"
        "[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' and m.tool_calls %}"
        "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]</s>"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ {'content': m.content} | tojson }}[/TOOL_RESULTS]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "vicuna": LOOP + "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %} USER: {{ m.content }}"
    "{% else %} ASSISTANT: {{ m.content }}{% endif %}{% endfor %}" + PROMPT + " ASSISTANT:{% endif %}",
    "zephyr": LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}",
    "stripping": LOOP
    + "<|{{ m.role }}|>\n{{ m.content.strip().replace('  ', ' ') }}</s>{% endfor %}"
    + PROMPT
    + "<|assistant|>\n{% endif %}",
    "shouting": LOOP
    + "<|{{ m.role }}|>\n{{ m.content | upper }}</s>\n{% endfor %}"
    + PROMPT
    + "<|assistant|>\n{% endif %}",
    "moving": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}"
        + LOOP
        + "{% if m.role == 'user' %}[INST] {% if loop.last or loop.index0 == messages | length - 2 %}{{ lead }}"
        "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "numbered": LOOP
    + "# turn {{ loop.index }} ({{ m.role }})\n{{ m.content }}</s>\n{% endfor %}"
    + PROMPT
    + "# turn {{ messages | length + 1 }} (assistant)\n{% endif %}",
    "thinking": LOOP
    + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' and not loop.last else m.content }}"
    "<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n<think>\n{% endif %}",
}
TEXT = {
    n: t for n, t in TEMPLATES.items() if not re.fullmatch(r".*_training|idefics3|smolvlm|llava_next", n)
} | BY_HAND
HAND_ENDS = {"meta": ("<|begin_of_text|>", "<|eot_id|>"), "thinking": (None, "<|im_end|>")}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}


@cache
def tokenizer_of(name: str) -> Any:
    if name in BY_HAND:
        return make_tokenizer(BY_HAND[name], *HAND_ENDS.get(name, ("<s>", "</s>")))
    return make_tokenizer(TEMPLATES[name], *ENDS[max((n for n in ENDS if name.startswith(n)), key=len)])


@cache
def encoding_of(name: str) -> Encoding:
    return make_encoding(tokenizer_of(name))


@cache
def subject_of(name: str) -> Subject:
    return Subject.named(name, tokenizer_of(name), tokenizer_of(name).chat_template, encoding_of(name).traits)


def trained_text(tokenizer: Any, row: EncodedRow, text: str) -> list[tuple[int, int]]:
    """Runs of trained tokens as characters; the tokens are bytes or special, so they add up to the text."""
    ends, at, special = [], 0, {t.content for t in tokenizer.added_tokens_decoder.values()}
    for name in tokenizer.convert_ids_to_tokens(row.input_ids):
        at += len(name.encode()) if name in special else len(name)
        ends.append(at)
    assert at == len(text.encode())
    runs: list[tuple[int, int]] = []
    for n, label in enumerate(row.labels):
        if label == IGNORED:
            continue
        start = ends[n - 1] if n else 0
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], ends[n])
        else:
            runs.append((start, ends[n]))
    return runs


def judge(name: str, row: dict, train_on: str, made: Any) -> str:
    """ "refused", "right" or "unknown" (the oracle cannot tell); AssertionError where the mask is wrong."""
    if isinstance(made, RowProblem):
        return "refused"
    (piece,) = made
    subject = subject_of(name)
    text = render(subject, row)
    runs = trained_text(subject.tokenizer, piece, text)
    wanted = expected_spans(subject, row, chosen_turns(row["messages"], train_on))
    if wanted is None:  # an open <think> in an answer's text is more than text to some templates
        assert name == "stripping" or any("<think>" in m["content"] for m in row["messages"])
        return "unknown"
    octets = text.encode()
    expected = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in wanted]
    shown = [octets[a:b].decode(errors="replace") for a, b in runs], [text[a:b] for a, b in wanted]
    assert len(runs) == len(expected), shown
    for (a, b), (c, d) in zip(runs, expected, strict=True):
        # one token of this tokenizer is longer than a byte: "ab", which a border may cut through
        assert a in (c, c - 1) and b in (d, d + 1), shown
        assert a == c or octets[a : c + 1] == b"ab", shown
        assert b == d or octets[d - 1 : b] == b"ab", shown
    return "right"


# ------------------------------------------------------------------------------------------------------- chats

WORDS = [
    "yes",
    "no",
    "user",
    "assistant",
    "model",
    "system",
    "ab",
    "bab",
    "q",
    "kit_a",
    "<table>",
    "A",
    "</",
    "\n",
    "#",
]
SHAPES = ["{}", "{}", " {}", "{}\n\n", "\n{}", "{}  \n", "a  {}", "{}é", "🙂{}", '"{}"', "{}\n\n{}", "\\{}"]


def texts(name: str) -> st.SearchStrategy[str]:
    """Contents that look like what surrounds them."""
    header, end = subject_of(name).header, subject_of(name).ending
    specials = sorted(t for t in tokenizer_of(name).all_special_tokens if t != "<|pad|>")
    framing = [re.sub(r"\\(.)", r"\1", pattern) for pattern in (header, end) if not re.search(r"[?(|$]", pattern)]
    framing += [f"{f}yes" for f in framing] + [a + b for a in framing for b in framing]
    plain = st.builds(lambda shape, word: shape.replace("{}", word), st.sampled_from(SHAPES), st.sampled_from(WORDS))
    nasty = st.builds(
        lambda a, b, c: a + b + c, plain, st.sampled_from([*specials, *framing, "<think>"]), plain | st.just("")
    )
    return st.one_of(plain, plain, plain, nasty).filter(lambda text: text.strip())


@st.composite
def chats(draw: Any, name: str) -> dict:
    text = texts(name)
    messages: list[dict] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(text)})
    row: dict[str, Any] = {"messages": messages}
    if draw(st.sampled_from([False, False, True])):
        row["tools"] = [TOOL]
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(text)})
        if "tools" in row and draw(st.booleans()):
            call = {"type": "function", "id": "callabcd1", "function": {"name": "add", "arguments": {"a": draw(text)}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "name": "add", "tool_call_id": "callabcd1", "content": draw(text)})
        answer = {"role": "assistant", "content": draw(text)}
        thought = draw(st.sampled_from([None, None, None, "field", "content"]))
        if thought == "field":
            answer["reasoning_content"] = draw(text)
        elif thought:
            answer["content"] = f"<think>\n{draw(text)}\n</think>\n\n{answer['content']}"
        messages.append(answer)
    if draw(st.sampled_from([False, False, False, True])):
        messages.append({"role": "user", "content": draw(text)})
    for message in messages:
        if message["role"] == "assistant" and (weight := draw(st.sampled_from([None, None, 0, 1]))) is not None:
            message["weight"] = weight
    return row


def check_row(name: str, row: dict, encoding: Encoding) -> Counter[str]:
    seen: Counter[str] = Counter()
    for train_on in ("assistant_turns", "last_turn", "chosen_turns"):
        if not chosen_turns(row["messages"], train_on):
            continue
        (made,) = encode_rows(tokenizer_of(name), [row], replace(encoding, train_on=train_on))
        seen[judge(name, row, train_on, made)] += 1
    return seen


@pytest.mark.parametrize("name", TEXT)
def test_each_mask_is_right_or_refused(name: str) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES < 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(chats(name))
    def check(row: dict) -> None:
        seen.update(check_row(name, row, encoding_of(name)))

    check()
    print(name, dict(seen))


TURNS = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
MORE = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "I am."}]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "id": "callabcd1", "function": {"name": "add", "arguments": {"a": "1"}}}
USED = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "callabcd1", "content": "2"},
]
SUM = [TURNS[0], *USED, TURNS[1]]
ORDINARY = {
    "one": TURNS,
    "many": TURNS + MORE + TURNS,
    "user last": TURNS + MORE[:1],
    "system": [SYSTEM, *TURNS],
    "system, many": [SYSTEM, *TURNS, *MORE],
    "tools": SUM,
    "tools, many": SUM + [MORE[0], *USED, MORE[1]],
    "reasoning": [{**m, "reasoning_content": "Hm."} if m["role"] == "assistant" else m for m in TURNS + MORE],
    "thinking": [
        {**m, "content": f"<think>\nHm.\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for m in TURNS + MORE
    ],
}
# All ordinary chats that are refused: (templates, chats, train_on, why)
REFUSED = [
    ("cohere|gemma3?", "tools.*", ".*", "Conversation roles must alternate"),
    ("gemma", "system.*", ".*", "System role not supported"),
    ("cohere2|lfm2|llama[23]|phi3.*|qwen2_5_vl|meta|vicuna|zephyr|stripping|moving|numbered|thinking", "tools.*", ".*", "leaves out the calls"),
    # it writes a second call without the header of an assistant's turn
    ("deepseek.*", "tools, many", "assistant_turns", "in another way once more turns follow"),
    # the list of tools and the system's text stand in the last question
    ("mistral_v3", "tools.*", "assistant_turns", "in another way once more turns follow"),
    ("moving", "system, many", "assistant_turns", "in another way once more turns follow"),
    ("shouting", ".*", ".*", "leaves out"),
]  # fmt: skip


@pytest.mark.parametrize("name", TEXT)
def test_ordinary_chats_are_refused_only_where_the_template_cannot_carry_them(name: str) -> None:
    for kind, messages in ORDINARY.items():
        row = {"messages": messages} | ({"tools": [TOOL]} if "tools" in kind else {})
        for train_on in ("assistant_turns", "last_turn"):
            (made,) = encode_rows(tokenizer_of(name), [row], replace(encoding_of(name), train_on=train_on))
            why = [w for n, k, t, w in REFUSED if all(map(re.fullmatch, (n, k, t), (name, kind, train_on)))]
            if why:
                assert judge(name, row, train_on, made) == "refused" and why[0] in str(made), (kind, made)
            else:
                assert judge(name, row, train_on, made) == "right", (kind, made)


TWINS = [n for n in TEXT if f"{n}_training" in TEMPLATES]


@pytest.mark.parametrize("name", TWINS)
def test_marks_of_a_training_template_hold_the_answers_and_nothing_else(name: str) -> None:
    tokenizer = tokenizer_of(name)
    encoding = make_encoding(tokenizer, TEMPLATES[f"{name}_training"])

    @settings(max_examples=EXAMPLES // 2, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(chats(name))
    def check(row: dict) -> None:
        blanked, texts = blank_out(row)
        for train_on in ("assistant_turns", "last_turn", "chosen_turns"):
            chosen = chosen_turns(row["messages"], train_on)
            (made,) = encode_rows(tokenizer, [blanked], replace(encoding, train_on=train_on))
            if isinstance(made, RowProblem) or not chosen:
                continue
            trained = tokenizer.decode([label for label in made[0].labels if label != IGNORED])
            whole = tokenizer.decode(made[0].input_ids)
            for k, (turn, _) in enumerate(texts):
                mark = chr(0xE100 + k)
                assert trained.count(mark) == (whole.count(mark) if turn in chosen else 0)

    check()


# ------------------------------------------------------------------------------------------- tokens, weights, marks

ZEPHYR = "zephyr"


def encode_with(tokenizer: Any, messages: list[dict], train_on: str = "assistant_turns", **options: Any) -> Any:
    return encode_rows(tokenizer, [{"messages": messages}], make_encoding(tokenizer, train_on=train_on, **options))[0]


def shown(tokenizer: Any, row: EncodedRow) -> str:
    """The row as text, what is not trained as dots."""
    return "".join("·" if label == IGNORED else tokenizer.decode([label]) for label in row.labels).strip("·")


def test_a_turn_of_weight_0_is_never_trained() -> None:
    tokenizer = tokenizer_of(ZEPHYR)
    messages = [{**m, "weight": weight} for m, weight in zip(TURNS + MORE, (1, 0, 1, 1), strict=True)]
    for train_on in ("everything", "assistant_turns", "chosen_turns", "last_turn"):
        (row,) = encode_with(tokenizer, messages, train_on)
        trained = tokenizer.decode([label for label in row.labels if label != IGNORED])
        assert "Yes." not in trained and trained.endswith("I am.</s>\n"[: None if train_on == "everything" else -1])
        assert trained.count("</s>") == (3 if train_on == "everything" else 1)
    pair = {"prompt": messages[:1], "completion": messages[1:]}
    (made,) = encode_rows(tokenizer, [pair], make_encoding(tokenizer, train_on="completion"))
    assert "Yes." not in shown(tokenizer, made[0]) and "I am.</s>" in shown(tokenizer, made[0])
    for weights, train_on, why in [
        ((None, 0), "assistant_turns", "every weight is 0"),
        ((None, None), "chosen_turns", "it has no turn to train"),
        ((0, 1), "everything", "not the assistant's has weight 0"),
    ]:
        turns = [m if w is None else {**m, "weight": w} for m, w in zip(TURNS, weights, strict=True)]
        assert why in str(encode_with(tokenizer, turns, train_on))


def test_the_end_of_a_turn_is_trained_where_it_is_the_pad_token() -> None:
    tokenizer = make_tokenizer(BY_HAND[ZEPHYR], "<s>", "</s>")
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = encode_with(tokenizer, TURNS + MORE)
    assert row.labels.count(tokenizer.eos_token_id) == 2 and row.input_ids.count(tokenizer.eos_token_id) == 4


class Letters(PreTrainedTokenizer):
    """A tokenizer without offsets: a character is a token."""

    def __init__(self, **options: Any) -> None:
        self.letters = [chr(n) for n in range(256)]
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {c: n for n, c in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return sum(map(ord, token)) % 256

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_without_offsets_has_the_same_masks() -> None:
    slow = Letters(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    slow.chat_template = BY_HAND[ZEPHYR]
    assert not slow.is_fast
    fast = tokenizer_of(ZEPHYR)
    for messages in (TURNS, [SYSTEM, *TURNS, *MORE], TURNS + MORE[:1]):
        for train_on in ("assistant_turns", "last_turn"):
            (ours,), (theirs,) = (encode_with(t, messages, train_on) for t in (slow, fast))
            assert shown(slow, ours).replace("·", "") == shown(fast, theirs).replace("·", "")

    class Merging(Letters):
        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return re.findall("..|.", text, re.DOTALL)  # where a token begins depends on all before it

    merging = Merging(eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    merging.chat_template = BY_HAND["vicuna"]
    made = encode_with(merging, [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "def"}])
    assert "cannot be told apart" in str(made)


def make_sentencepiece(template: str, normalizer: Any) -> PreTrainedTokenizerFast:
    """Words that begin with a blank, letters, and bytes for all else, as SentencePiece has them."""
    pieces = [f"<0x{n:02X}>" for n in range(256)] + [
        *"▁abcdefghijklmnopqrstuvwxyzABCDEFGHI.?!:\n",
        "▁y",
        "▁ye",
        "▁yes",
    ]
    merges = [("▁", "y"), ("▁y", "e"), ("▁ye", "s")]
    core = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, merges, byte_fallback=True))
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ["llama2", "vicuna"])
@pytest.mark.parametrize(
    "normalizer", [None, normalizers.NFKC(), normalizers.Sequence([normalizers.Strip(), normalizers.NFD()])], ids=str
)
def test_characters_without_a_token_of_their_own_move_no_border(template: str, normalizer: Any) -> None:
    tokenizer = make_sentencepiece(BY_HAND[template], normalizer)
    end = "</s>" if template == "llama2" else ""
    for said in ("yes", "yes  no", "🙂", "ﬁ ½ é", "a\u0301 b🙂", "日本"):
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        for asked, count in ((messages, 1), (messages * 2, 2), (messages + messages[:1], 1)):
            (row,) = encode_with(tokenizer, asked)
            runs = [run for run in "".join("\n" if x == IGNORED else f"{x} " for x in row.labels).split("\n") if run]
            assert len(runs) == count
            for run in runs:
                text = tokenizer.decode([int(n) for n in run.split()])
                wanted = normalizer.normalize_str(said) if normalizer else said
                assert text.replace(" ", "") == (wanted + end).replace(" ", ""), (said, text)


def test_long_chats_are_cut_and_split_with_their_masks() -> None:
    tokenizer = tokenizer_of(ZEPHYR)
    (whole,) = encode_with(tokenizer, TURNS + MORE)
    size = len(whole.input_ids)
    for limit in (30, size - 1, size // 2):
        for mode, piece in (("keep_start", slice(limit)), ("keep_end", slice(size - limit, None))):
            (row,) = encode_with(tokenizer, TURNS + MORE, max_length=limit, truncation_mode=mode)
            assert (row.input_ids, row.labels) == (whole.input_ids[piece], whole.labels[piece])
            assert row.notes == ("cut",)
        pieces = encode_with(tokenizer, TURNS + MORE, max_length=limit, on_long_row="split")
        assert sum(p.trained for p in pieces) == whole.trained  # a piece without a trained token is left out
        assert all(len(p.input_ids) <= limit and p.trained and "split" in p.notes for p in pieces)
    for how in ("drop", "refuse"):
        assert isinstance(encode_with(tokenizer, TURNS, max_length=10, on_long_row=how), LongRow)
    assert "no trained token is left" in str(encode_with(tokenizer, TURNS, max_length=10))


def test_a_call_that_is_written_only_beside_its_tools_is_known_to_be_written() -> None:
    body = (
        LOOP
        + "{{ m.role }}: {% if tools %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endif %}"
    )
    tokenizer = make_tokenizer(
        body + "{{ m.content }}</s>{% endfor %}" + PROMPT + "assistant: {% endif %}", "<s>", "</s>"
    )
    encoding = make_encoding(tokenizer, train_on="assistant_turns")
    made = encode_rows(tokenizer, [{"messages": SUM, "tools": [TOOL]}, {"messages": SUM}], encoding)
    assert '"arguments"' in shown(tokenizer, made[0][0]) and "leaves out the tool call" in str(made[1])


MARK, END = "{% generation %}", "{% endgeneration %}"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{% if m.role == 'user' %}@{{ m.content }}</s>#{% else %}{{ m.content }}</s>{% endif %}", "leaves out the text"),
        ("{% if m.role == 'assistant' %}@#{% endif %}{{ m.content }}</s>", "marks no answer|marks 0 answers"),
        ("{% if m.role == 'assistant' %}@{{ m.role }}#{% endif %}{{ m.content }}</s>", "leaves out the text"),
        ("@{{ m.content }}#</s>", "marks 4 answers of 2|leaves out the text"),
        ("{% if m.role == 'assistant' %}@{{ m.content[:2] }}#-@{{ m.content[2:] }}</s>#{% else %}{{ m.content }}{% endif %}", "marks 4 answers of 2"),
    ],
)  # fmt: skip
def test_marks_that_do_not_hold_the_answers_are_refused(body: str, why: str) -> None:
    body = body.replace("@", MARK).replace("#", END)
    tokenizer = make_tokenizer(LOOP + "{{ m.role }}: " + body + "{% endfor %}", "<s>", "</s>")
    for train_on in ("assistant_turns", "last_turn"):
        made = encode_with(tokenizer, TURNS + MORE, train_on)
        assert isinstance(made, RowProblem) and re.search(why, str(made)), made


def test_marks_of_several_parts_of_a_turn_are_one_where_they_touch() -> None:
    assert marked_spans(TURNS + MORE, [(0, 0), (3, 5), (5, 9), (9, 9), (11, 12)]) == {1: (3, 9), 3: (11, 12)}


@pytest.mark.parametrize(
    ("name", "ends"),
    [("qwen3", ["<|im_end|>"]), ("zephyr", ["</s>"]), ("llama2", ["</s>"]), ("meta", ["<|eot_id|>", "<|end_of_text|>"]),
     ("gptoss", ["<|return|>"]), ("gemma3", ["<end_of_turn>", "<eos>"]), ("phi3", ["<|end|>", "<|endoftext|>"]), ("vicuna", [])],
)  # fmt: skip
def test_the_token_that_ends_a_turn_is_known_where_it_is_not_the_tokenizers_own(name: str, ends: list[str]) -> None:
    tokenizer = copy.deepcopy(tokenizer_of(name))
    if name == "meta":  # as a base has it
        tokenizer.add_special_tokens({"eos_token": "<|end_of_text|>"})
    if name == "qwen3":
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    known = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    (row,) = encode_with(tokenizer, TURNS)
    assert any(label in known for label in row.labels) == bool(ends)
    assert tokenizer.decode([i for i in row.labels if i in known]).startswith(ends[0] if ends else "")


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_the_date_in_a_template_is_that_of_the_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(name)

    def ids(day: str | None) -> list[int]:
        return encode_with(tokenizer, TURNS, template=run_template(tokenizer, False, day))[0].input_ids

    template = run_template(tokenizer, False, "2025-07-01")
    assert writes_date(tokenizer.chat_template) and not writes_date(template)
    found = ids("2025-07-01")
    assert re.search("2025-07-01|01 Jul 2025", tokenizer.decode(found))

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 2, 3)

    unfrozen = ids(None)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert ids("2025-07-01") == found != ids("2025-07-02")
    assert ids(None) != unfrozen  # what would have been trained


def test_a_date_that_a_template_computes_is_refused() -> None:
    with pytest.raises(KitError, match="cannot be fixed"):
        freeze_date("{{ strftime_now(format) }}", "2025-07-01")


def test_the_committed_table_of_real_tokenizers_holds_nothing_wrong() -> None:
    newest = max((Path(__file__).parents[1] / "benchmarks" / "results").glob("*-mask-table.json"))
    table = json.loads(newest.read_text())
    cells = [cell for model in table["models"].values() for chat in model["chats"].values() for cell in chat.values()]
    assert len(table["models"]) >= 8 and len(cells) > 300
    assert not [cell for cell in cells if not re.match("verified|refused: |$", cell["result"])]
    assert not [cell for cell in cells if cell.get("trl") == "differs"]
    assert {cell["result"] for cell in cells} & {"verified"}
