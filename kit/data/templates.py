"""Chats as text: the template of a run with its date fixed, and each row written by it."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from itertools import product
from typing import Any

from kit.data.masks import Messages, Span, common_length
from kit.errors import KitError, first_line
from kit.inspection.tokenizer import advise_template
from kit.rows.turns import RowProblem

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
THINKING = "</think>"


@dataclass(frozen=True)
class Traits:
    """What a chat template asks of its callers, or does unasked; `probe_template` finds out."""

    arguments_as_text: bool = False  # the arguments of a tool call must be JSON text: it writes objects as Python does
    empty_content: str | None = ""  # what stands as the content of a message that only calls tools; "absent": no key
    # the generation prompt, where it follows every chat, asked for or not; None where it cannot be told from a turn
    unasked_prompt: str | None = ""
    writes_calls: bool = True  # False: it leaves them out without a word


@dataclass(frozen=True)
class ChatTemplate:
    """What a row is rendered with: a template's text, its tools and whatever else the row passes to it."""

    text: str
    tools: list[Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    traits: Traits = Traits()

    @property
    def has_marks(self) -> bool:
        return has_generation_marks(self.text)

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        return self._render(messages, add_generation_prompt, False)[0][0]

    def render_with_marks(self, messages: Messages) -> tuple[str, list[Span]]:
        texts, spans = self._render(messages, False, True)
        return texts[0], spans[0]

    def _render(self, messages: Messages, add_generation_prompt: bool, marks: bool) -> Any:
        """RowProblem with the template's own words where it refuses the chat."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if any("tool_calls" in m for m in messages):
            if not self.traits.writes_calls:
                raise RowProblem("the chat template leaves out the calls of tools")
            messages = [_form_tool_calls(m, self.traits) if "tool_calls" in m else m for m in messages]
        try:
            return render_jinja_template(
                [messages],
                self.tools,
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self.arguments,
            )
        except Exception as error:  # noqa: BLE001 - jinja errors and whatever a template raises
            raise RowProblem(f"the chat template refuses it: {first_line(error)}") from None


@lru_cache(maxsize=64)
def has_generation_marks(template: str) -> bool:
    return bool(GENERATION.search(template))


def row_template(tokenizer: Any, row: dict[str, Any], text: str | None, traits: Traits) -> ChatTemplate:
    """What a row is rendered with; `chat_template_kwargs` overrule its `tools`, as in TRL.

    text: the run's template, None for the tokenizer's own. KitError where the tokenizer has none, RowProblem where it
    has several and none that fits.
    """
    if not tokenizer.chat_template and text is None:
        problem = "the data are chats, and the tokenizer has no chat template"
        raise KitError(
            problem, "tokenizer.chat_template", advise_template(tokenizer.get_vocab()), rule="chat-template"
        )
    own = dict(row.get("chat_template_kwargs") or {})
    tools = own.pop("tools", row.get("tools")) or None
    try:
        text = tokenizer.get_chat_template(own.pop("chat_template", None) or text, tools)
    except ValueError as error:
        raise RowProblem(first_line(error)) from None
    return ChatTemplate(text, tools, {**tokenizer.special_tokens_map, **own}, traits)


def freeze_date(template: str, day: str) -> str:
    """Replace every call of `strftime_now` by the date of the run, so that its tokens are the same tomorrow.

    KitError where the template asks for the date in a way that cannot be replaced.
    """
    moment = date.fromisoformat(day)
    frozen = NOW.sub(lambda call: json.dumps(moment.strftime(call[2]), ensure_ascii=False), template)
    if re.search(r"strftime_now\s*\(", frozen):
        problem = "the chat template writes today's date in a format that it computes: it cannot be fixed"
        raise KitError(problem, "tokenizer.chat_template", "write the date into a template of your own")
    return frozen


def writes_date(template: str) -> bool:
    return re.search(r"strftime_now\s*\(", template) is not None


def run_template(tokenizer: Any, training_twin: bool, day: str | None) -> str | None:
    """The chat template that a run renders with; None where it is the tokenizer's own.

    training_twin: with assistant_only_loss TRL replaces a template that it knows and that has no {% generation %}
    marks by one of its own; a template that it does not know stays. The date of one that writes today's is fixed.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):  # none, or several by name: which of them is used depends on the row
        return None
    text = own
    if training_twin and not has_generation_marks(own):
        from trl.chat_template_utils import get_training_chat_template

        try:
            text = get_training_chat_template(tokenizer) or own
        except ValueError:
            pass  # its spans are derived
    if day and writes_date(text):
        text = freeze_date(text, day)
    return None if text == own else text


def probe_template(tokenizer: Any, text: str | None) -> Traits:
    """Find a template's traits by rendering a chat that calls a tool, and one that does not.

    A call must be written whole, with its arguments as JSON, once: the first form of it that is counts.
    """
    call = {"id": "callabcd1", "type": "function", "function": {"name": "kit_probe", "arguments": {"kit_k": "kit_v"}}}
    question: Messages = [{"role": "user", "content": "q"}]
    answer: Messages = [{"role": "tool", "name": "kit_probe", "tool_call_id": "callabcd1", "content": "r"}]
    calls: Messages = [*question, {"role": "assistant", "content": "", "tool_calls": [call]}, *answer]
    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "kit_probe", "description": "d", "parameters": schema}}
    found, writes = Traits(), []
    for content, as_text, tools in product(("", None, "absent"), (False, True), (None, [tool])):
        traits = Traits(as_text, content)
        try:
            written = row_template(tokenizer, {"tools": tools}, text, traits).render(calls)
        except RowProblem:
            continue
        writes.append(all(word in written for word in ("kit_probe", "kit_k", "kit_v")))
        spoiled = '\\"kit_k' in written or "'kit_k'" in written
        if writes[-1] and not spoiled:
            found = traits
            break
    found = replace(found, writes_calls=any(writes) or not writes)
    with suppress(RowProblem):  # a template may refuse such a chat for reasons of its own
        return replace(found, unasked_prompt=_unasked_prompt(row_template(tokenizer, {}, text, found)))
    return found


def _unasked_prompt(template: ChatTemplate) -> str | None:
    """Traits.unasked_prompt: what the renderings of a question and of its answer both end with, less a turn's end."""
    asked: Messages = [{"role": "user", "content": "kit_q"}]
    answered: Messages = [*asked, {"role": "assistant", "content": "kit_a"}]
    finished = template.render(answered)
    if finished != template.render(answered, add_generation_prompt=True):
        return ""
    question = template.render(asked)
    ending = question[len(question) - common_length(question[::-1], finished[::-1]) :]
    if not ending.strip():
        return ""
    header = question.partition("kit_q")[0]
    between = template.render([*answered, {"role": "user", "content": "kit_r"}])
    between = between.partition("kit_a")[2].partition("kit_r")[0]  # the answer's end and the header of a question
    closing = between[: len(between) - common_length(between[::-1], header[::-1])]
    return ending.removeprefix(closing) if ending.startswith(closing) else None


def _form_tool_calls(message: dict[str, Any], traits: Traits) -> dict[str, Any]:
    formed = dict(message)
    if not message["content"]:
        if traits.empty_content == "absent":
            del formed["content"]
        else:
            formed["content"] = traits.empty_content
    if traits.arguments_as_text:
        formed["tool_calls"] = [
            {
                **c,
                "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"], ensure_ascii=False)},
            }
            for c in message["tool_calls"]
        ]
    return formed


def check_written(messages: Messages, rendered: str, spans: dict[int, Span] | None = None) -> None:
    """RowProblem where a turn's text or a tool's name is not in the rendered chat: the template left it out.

    spans: of the assistant turns, where they are known; then their text must be inside, that of others between them.
    """
    starts = sorted(spans.values()) if spans else []
    reached = 0
    for n, message in enumerate(messages):
        place = rendered
        if spans and n in spans:
            place, reached = rendered[slice(*spans[n])], spans[n][1]
        elif spans and message["role"] not in ("system", "developer"):  # some templates write these into a later turn
            place = rendered[reached : next((start for start, _ in starts if start >= reached), None)]
        content = message["content"].strip()
        if content and content not in place and not _is_written_otherwise(message, content, place):
            raise RowProblem(f"the chat template leaves out the text of turn {n + 1} ({message['role']})")
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in place:
                raise RowProblem(f"the chat template leaves out the tool call of turn {n + 1}")


def _is_written_otherwise(message: dict[str, Any], content: str, rendered: str) -> bool:
    if message["role"] == "assistant" and THINKING in content:
        return content.rsplit(THINKING, 1)[1].strip() in rendered
    return json.dumps(content, ensure_ascii=False)[1:-1] in rendered  # templates write a tool's answer with tojson


def reasoning_is_left_out(messages: Messages, rendered: str) -> bool:
    """Whether the template drops the reasoning of a turn (many do so for all but the last)."""
    reached = 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        thought = message.get("reasoning_content")
        if thought is None and THINKING in message["content"]:
            thought = message["content"].rsplit(THINKING, 1)[0].split("<think>")[-1]
        if thought and thought.strip():
            reached = rendered.find(thought.strip(), reached) + len(thought.strip())
            if reached < len(thought.strip()):
                return True
    return False
