"""The turns of a chat as canonical messages: roles by one name, content as text, calls and tools as objects.

A message is {"role", "content": str} with "tool_calls", "reasoning_content", "name", "tool_call_id" and "weight" (0 or
1) where the turn has them: never a key with None. An empty content stands only beside calls or reasoning, and in the
turns of system and tools, where it has a meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from kit.schema.run_plan import DataSource

Row = dict[str, Any]

CALL = "tool_call"  # the role of a turn whose content is the JSON of an assistant's call, or of a list of calls
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((CALL, "function_call"), CALL),
    "system": "system",
    "developer": "developer",
}
WEIGHTS = ("weight", "loss_weight", "train", "training")
REASONING = ("reasoning_content", "reasoning", "thinking")
MEDIA = ("images", "videos", "audios")
TEXT_PARTS = ("text", "input_text", "output_text", None)  # None: {"text": ...} and nothing else
RESERVED = {  # arguments of apply_chat_template that are not the row's to say
    *("conversation", "chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "add_generation_prompt", "continue_final_message"),
}


class RowProblem(ValueError):
    """What is wrong with one row, in words."""


class EmptyAnswer(RowProblem):
    """A row in which nothing is left to learn, as public sets have a few of."""

    def __init__(self) -> None:
        super().__init__("the answer is empty")


def map_role(role: str, source: DataSource) -> str:
    """system, developer, user, assistant, tool, CALL or what `roles` says; RowProblem for a role that nobody knows."""
    lower = role.strip().lower()
    told = {theirs.lower(): ours for theirs, ours in source.roles.items()}
    named = source.roles.get(role) or ROLES.get(role) or told.get(lower) or ROLES.get(lower)
    if named is None:
        raise RowProblem(f"the role {short(role)!r} is not known: dataset.roles.{short(role)}=user")
    return named


def clean_turns(turns: Any, name: str, source: DataSource) -> list[Row]:
    """Canonical messages of a list of turns; calls that follow each other as turns of their own become one turn."""
    if not isinstance(turns, list) or not turns:
        raise RowProblem(f"{name} is empty" if turns == [] else f"{name} is {kind(turns)}, not a list of messages")
    messages: list[Row] = []
    merging = False
    for number, turn in enumerate(turns, 1):
        try:
            if not isinstance(turn, dict):
                raise RowProblem(f"is {kind(turn)}, not an object")
            if "assistant" in turn and (asking := "human" if "human" in turn else "user") in turn:
                messages.append(_clean_turn({"content": turn[asking]}, "user"))
                messages.append(_clean_turn({"content": turn["assistant"]}, "assistant"))
                continue
            role = turn.get("role") or turn.get("from")
            if not isinstance(role, str):
                raise RowProblem("has no role")
            role = map_role(role, source)
            message = _clean_turn(turn, role)
        except RowProblem as problem:
            raise RowProblem(f"turn {number}: {problem}") from None
        if role == CALL and merging and message.get("weight") == messages[-1].get("weight"):
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
        merging = role == CALL
    return messages


def _clean_turn(turn: Row, role: str) -> Row:
    """A canonical message of a turn, which is an object and whose role is mapped."""
    content = turn.get("content")
    if content is None:
        content = turn.get("value")
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    extra = _read_extras(turn, role) if len(turn) > 2 or content is None else {}
    if role == CALL:
        extra["tool_calls"] = _read_calls(content)
        role, content = "assistant", ""
    speaks_otherwise = "tool_calls" in extra or "reasoning_content" in extra
    if content is None:
        if not speaks_otherwise:
            raise RowProblem("has no content")
        content = ""
    if not check_text(content, "content").strip() and role in ("user", "assistant") and not speaks_otherwise:
        raise RowProblem(f"({role}) is empty")
    return {"role": role, "content": content, **extra}


def _part_text(part: Any) -> str:
    text = part
    if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
        text = part.get("text", part.get("value", part))  # "value": LLaMA-Factory's newer files
    if not isinstance(text, str):
        what = part.get("type", part.keys()) if isinstance(part, dict) else kind(part)
        raise RowProblem(f"a part of its content is {short(what)}; only text is trained")
    return text


def _read_extras(turn: Row, role: str) -> Row:
    """What a turn has beside role and content; other keys (ids, times, ...) are not for the model."""
    extra: Row = {}
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls and role != "assistant":
        raise RowProblem(f"({role}) calls a tool, which only an assistant does")
    if calls and (calls := _read_calls(calls)):
        extra["tool_calls"] = calls
    texts = {"name": turn.get("name"), "tool_call_id": turn.get("tool_call_id")}
    if role == "assistant":
        texts["reasoning_content"] = next((turn[name] for name in REASONING if turn.get(name)), None)
    extra |= {name: check_text(text, name) for name, text in texts.items() if text not in (None, "")}
    weight = next((turn[name] for name in WEIGHTS if turn.get(name) is not None), None)
    if weight is not None:
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise RowProblem("its weight is neither 0 nor 1")
        extra["weight"] = int(weight)
    if turn.get("train_detail") or turn.get("training_detail"):
        raise RowProblem("only whole turns are trained or not: train_detail cannot be kept")
    return extra


def _read_calls(calls: Any) -> list[Row]:
    calls = parse_json(calls, "a tool call")
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = parse_json(call, "a tool call")
        inner = call.get("function") if isinstance(call, dict) else None
        function = inner if isinstance(inner, dict) else call
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            raise RowProblem("a tool call has no name")
        what = f"arguments of {short(name)}"
        arguments = parse_json(function.get("arguments", function.get("parameters")), what)
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowProblem(f"{what} is {kind(arguments)}, not an object")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        read.append({"type": "function", **known, "function": {"name": name, "arguments": arguments}})
    return _check_json(read, "a tool call")


def template_arguments(row: Row, turns: Iterable[Any]) -> Row:
    """The row's `tools` (some sets have them on a turn) and `chat_template_kwargs`, where it has any."""
    if media := next((name for name in MEDIA if row.get(name)), None):
        raise RowProblem(f"has {media}; only text is trained")
    found: Row = {}
    tools = row.get("tools") or row.get("functions")
    tools = tools or next((t["tools"] for t in turns if isinstance(t, dict) and t.get("tools")), None)
    if tools := parse_json(tools, "tools"):
        found["tools"] = _read_tools(tools)
    if arguments := parse_json(row.get("chat_template_kwargs"), "chat_template_kwargs"):
        if not isinstance(arguments, dict):
            raise RowProblem(f"chat_template_kwargs is {kind(arguments)}, not an object")
        if reserved := RESERVED & arguments.keys():
            raise RowProblem(f"chat_template_kwargs cannot set {min(reserved)}")
        found["chat_template_kwargs"] = _check_json(arguments, "chat_template_kwargs")
    return found


def _read_tools(tools: Any) -> list[Row]:
    if not isinstance(tools, list):
        raise RowProblem(f"tools is {kind(tools)}, not a list")
    read = []
    for tool in tools:
        tool = parse_json(tool, "a tool")
        if isinstance(tool, dict) and not isinstance(tool.get("function"), dict):  # bare
            tool = {"type": "function", "function": {k: v for k, v in tool.items() if k not in ("type", "function")}}
        if not isinstance(tool, dict) or not isinstance(tool["function"].get("name"), str):
            raise RowProblem("a tool has no name")
        read.append(tool)
    return _check_json(read, "tools")


def kind(value: Any) -> str:
    """What a value is, in a reader's words."""
    if isinstance(value, float) and value != value:
        return "NaN"
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return {**kinds, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """At most 60 characters, all of which can be printed."""
    text = str(value)[:61].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else text[:59] + "…"


def check_text(value: Any, name: str) -> str:
    """The value, which is text that a tokenizer takes; RowProblem for any other."""
    if not isinstance(value, str):
        raise RowProblem(f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem("has half a character (a lone surrogate)") from None
    return value


def parse_json(value: Any, what: str) -> Any:
    """What text says as JSON, None where it is blank; what is no text as it is."""
    try:
        return (json.loads(value) if value.strip() else None) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise RowProblem(f"{what} is not JSON") from None


def _check_json(value: Any, what: str) -> Any:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise RowProblem(f"{what} holds what JSON has not: NaN, half a character, a date") from None
    return value
