"""Where an assistant's turns stand in a rendered chat, found otherwise than kit.data.masks finds them.

What stands before and behind a turn is known here by heart for every template (TURNS). The chat is rendered with one
private character in the place of each text, the turns are found there, where nothing can be mistaken for anything
else, and their borders are carried over to the chat itself.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

CHATML = r"<\|im_start\|>assistant\n", r"<\|im_end\|>"
INST = r"\[/INST\]|\[/TOOL_RESULTS\]", r" ?</s>"
# (templates, what stands before an assistant's turn, what ends it)
TURNS = [
    (r"cohere2?", r"<\|CHATBOT_TOKEN\|>(<\|START_RESPONSE\|>)?", r"(<\|END_RESPONSE\|>)?<\|END_OF_TURN_TOKEN\|>"),
    (
        r"deepseek.*",
        r"<｜Assistant｜>|<｜tool▁outputs▁end｜>",
        r"<｜end▁of▁sentence｜>|<｜tool▁call▁end｜>(?=<｜tool▁outputs▁begin｜>)",
    ),
    # its generation prompt has no header behind a tool's answer, its next turn has: the model is to write it
    (
        r"diffusion_gemma",
        r"(?<!<tool_response\|>)<\|turn>model\n|<tool_response\|>",
        r"<turn\|>|<tool_call\|>(<\|tool_response>)?",
    ),
    (
        r"gemma4(_v\d)?",
        r"<\|turn>model\n|<tool_response\|>",
        r"<turn\|>|<tool_call\|>(<turn\|>|<\|tool_response>)?",
    ),
    (r"gemma3?", r"<start_of_turn>model\n", r"<end_of_turn>"),
    (r"glm4moe", r"<\|assistant\|>", r"(?=<\|(user|observation|assistant)\|>)|$"),
    (r"gptoss", r"<\|start\|>assistant", r"<\|end\|>|<\|return\|>|<\|call\|>"),
    (r"muse.*", r"<\|start\|>assistant", r"<\|eot\|>"),
    (r"lfm2_2_5.*", CHATML[0], CHATML[1] + r"\n"),  # as its own marks say
    (r"(lfm|qwen|nemotron|thinking).*", *CHATML),
    (r"llama3.*|meta", r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>|<\|eom_id\|>"),
    (r"phi3.*", r"<\|assistant\|>\n", r"<\|end\|>(\n<\|endoftext\|>)?"),
    (r"llama2|mistral.*|moving", *INST),
    (r"vicuna", r" ASSISTANT:", r"(?= USER:)|$"),
    (r"zephyr|stripping|shouting", r"<\|assistant\|>\n", r"</s>"),
    (r"numbered", r"# turn \d+ \(assistant\)\n", r"</s>"),
]


@dataclass(frozen=True)
class Subject:
    """A tokenizer with a chat template, what stands before and behind a turn in it, what it wants of tool calls."""

    tokenizer: Any
    template: str
    header: str
    ending: str
    traits: Any

    @classmethod
    def named(cls, name: str, tokenizer: Any, template: str, traits: Any) -> Subject:
        header, ending = next((header, ending) for names, header, ending in TURNS if re.fullmatch(names, name))
        return cls(tokenizer, template, header, ending, traits)


def blank_out(row: dict) -> tuple[dict, list[tuple[int, str]]]:
    """The row with a private character for each text, and of each character its turn and the text."""
    texts: list[tuple[int, str]] = []

    def blank(turn: int, text: str) -> str:
        if not text.strip():
            return text
        lead = re.fullmatch(r"(<think>\n)(.*)(\n</think>\n\n)(.*)", text, re.DOTALL)
        if lead:
            return lead[1] + blank(turn, lead[2]) + lead[3] + blank(turn, lead[4])
        texts.append((turn, text))
        return chr(0xE100 + len(texts) - 1)

    messages = []
    for n, message in enumerate(row["messages"]):
        made = {**message, "content": blank(n, message["content"])}
        if "reasoning_content" in message:
            made["reasoning_content"] = blank(n, message["reasoning_content"])
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            arguments = {"a": blank(n, call["function"]["arguments"]["a"])}
            made["tool_calls"] = [{**call, "function": {**call["function"], "arguments": arguments}}]
        messages.append(made)
    return {**row, "messages": messages}, texts


def render(subject: Subject, row: dict, asks: bool = False) -> str:
    """The chat as transformers writes it; what a template wants of tool calls is found out by the encoding."""
    traits = subject.traits
    messages = []
    for message in row["messages"]:
        made = {k: v for k, v in message.items() if k != "weight"}
        if "tool_calls" in made:
            if not made["content"]:
                made["content"] = traits.empty_content
            if made["content"] == "absent":
                del made["content"]
            if traits.arguments_as_text:
                (call,) = made["tool_calls"]
                text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                made["tool_calls"] = [{**call, "function": {**call["function"], "arguments": text}}]
        messages.append(made)
    return render_jinja_template(
        [messages],
        tools=row.get("tools"),
        chat_template=subject.template,
        add_generation_prompt=asks,
        **subject.tokenizer.special_tokens_map,
    )[0][0]


def written_forms(text: str) -> str:
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    forms = [text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")]
    forms += [escaped, text.upper(), text.strip().replace("  ", " ")]
    return "|".join(re.escape(form) for form in sorted(set(forms), key=len, reverse=True))


def expected_spans(subject: Subject, row: dict, turns: list[int]) -> list[tuple[int, int]] | None:
    """Spans of the assistant turns given; None where the template does not write such texts as it writes others."""
    blanked, texts = blank_out(row)
    skeleton, real = render(subject, blanked), render(subject, row)
    pieces = re.split("([\ue100-\ue1ff])", skeleton)
    pattern = "".join(
        f"(?P<g{i}>{written_forms(texts[ord(piece) - 0xE100][1])})" if i % 2 else re.escape(piece)
        for i, piece in enumerate(pieces)
    )
    match = re.fullmatch(pattern, real, re.DOTALL)
    if match is None:
        return None
    behind, before = [0], [0]  # ends of the private characters: in the skeleton, in the chat
    for i in range(1, len(pieces), 2):
        behind.append(sum(map(len, pieces[: i + 1])))
        before.append(match.end(f"g{i}"))

    def carry(at: int) -> int:
        k = max(k for k, end in enumerate(behind) if end <= at)
        return before[k] + at - behind[k]

    places: dict[int, list[int]] = {}
    for at, c in enumerate(skeleton):
        if "\ue100" <= c <= "\ue1ff":
            places.setdefault(texts[ord(c) - 0xE100][0], []).append(at)
    spans = []
    for n in turns:
        if n not in places:
            return None
        first, last = places[n][0], places[n][-1]
        earlier = max((ats[-1] + 1 for turn, ats in places.items() if turn < n), default=0)
        start = max(
            (m.end() for m in re.finditer(subject.header, skeleton[:first]) if m.end() > earlier), default=None
        )
        assert start is not None, skeleton
        closing = re.compile(subject.ending).search(skeleton, last + 1)
        assert closing
        # A generation prompt that goes on behind the header (an open <think>) is not what the model writes
        asked = render(subject, {**blanked, "messages": blanked["messages"][:n]}, True)
        more = (
            asked[[m.end() for m in re.finditer(subject.header, asked)][-1] :]
            if re.search(subject.header, asked[earlier:])
            else ""
        )
        begin = carry(start)
        if real.startswith(more, begin):
            begin += len(more)
        else:
            begin += len(re.match(r"(<[^<>]+>|\s)*", os.path.commonprefix([more, skeleton[start:first]]))[0])
        end = carry(closing.end())
        spans.append((begin, end if closing[0] else begin + len(real[begin:end].rstrip())))
    return spans
