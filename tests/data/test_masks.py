"""Which tokens are trained, against tests/mask_oracle.py: each result is exactly right, or the row is refused."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mask_oracle import Subject, expected_spans, render
from test_encode import ENDS, TEMPLATES, make_tokenizer

from kit.data.encode import IGNORED, EncodedRow, Encoding, encode_rows, make_encoding
from kit.data.masks import chosen_turns
from kit.data.turns import RowProblem

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
    if wanted is None:
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
