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
    named = source.roles.get(role) or ROLES.get(role)
    if named is None:
        lower = role.strip().lower()
        named = next((ours for theirs, ours in source.roles.items() if theirs.lower() == lower), ROLES.get(lower))
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
                messages.append(_clean_turn({"role": "user", "content": turn[asking]}, "user"))
                messages.append(_clean_turn({"role": "assistant", "content": turn["assistant"]}, "assistant"))
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
        content = _join_parts(content)
    extra = _read_extras(turn, role) if len(turn) > 2 or content is None else {}
    if role == CALL:
        extra["tool_calls"] = _read_calls(content)
        role, content = "assistant", ""
    if content is None and extra.keys() & {"tool_calls", "reasoning_content"}:
        content = ""
    if not isinstance(content, str):
        raise RowProblem("has no content" if content is None else f"content is {kind(content)}, not text")
    if (
        role in ("user", "assistant")
        and not extra.keys() & {"tool_calls", "reasoning_content"}
        and not content.strip()
    ):
        raise RowProblem(f"({role}) is empty")
    check_encodes(content)
    return {"role": role, "content": content, **extra}


def _join_parts(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        text = part
        if isinstance(part, dict) and part.get("type") in TEXT_PARTS:
            text = part.get("text", part.get("value", part))  # "value": LLaMA-Factory's newer files
        if not isinstance(text, str):
            what = part.get("type", part.keys()) if isinstance(part, dict) else kind(part)
            raise RowProblem(f"a part of its content is {short(what)}; only text is trained")
        texts.append(text)
    return "".join(texts)


def _read_extras(turn: Row, role: str) -> Row:
    """What a turn has beside role and content; other keys (ids, times, ...) are not for the model."""
    extra: Row = {}
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    if calls:
        if role != "assistant":
            raise RowProblem(f"({role}) calls a tool, which only an assistant does")
        if calls := _read_calls(calls):
            extra["tool_calls"] = calls
    reasoning = next((turn[name] for name in REASONING if turn.get(name)), None)
    texts = {"reasoning_content": reasoning if role == "assistant" else None}
    texts |= {name: turn.get(name) for name in ("name", "tool_call_id")}
    for name, text in texts.items():
        if text not in (None, ""):
            if not isinstance(text, str):
                raise RowProblem(f"{name} is {kind(text)}, not text")
            check_encodes(text)
            extra[name] = text
    weight = next((turn[name] for name in WEIGHTS if turn.get(name) is not None), None)
    if weight is not None:
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise RowProblem("its weight is neither 0 nor 1")
        extra["weight"] = int(weight)
    if turn.get("train_detail") or turn.get("training_detail"):
        raise RowProblem("only whole turns are trained or not: train_detail cannot be kept")
    return extra


def _read_calls(calls: Any) -> list[Row]:
    calls = parse_json(calls, "a tool call") if isinstance(calls, str) else calls
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = parse_json(call, "a tool call") if isinstance(call, str) else call
        inner = call.get("function") if isinstance(call, dict) else None
        function = inner if isinstance(inner, dict) else call
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            raise RowProblem("a tool call has no name")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = parse_json(arguments, f"arguments of {short(name)}")
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(arguments, dict):
            raise RowProblem(f"arguments of {short(name)} is {kind(arguments)}, not an object")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        read.append({"type": "function", **known, "function": {"name": name, "arguments": arguments}})
    _check_json(read, "a tool call")
    return read


def template_arguments(row: Row, turns: Iterable[Any]) -> Row:
    """The row's `tools` (some sets have them on a turn) and `chat_template_kwargs`, where it has any."""
    for name in MEDIA:
        if row.get(name):
            raise RowProblem(f"has {name}; only text is trained")
    found: Row = {}
    tools = row.get("tools") or row.get("functions")
    tools = tools or next((t["tools"] for t in turns if isinstance(t, dict) and t.get("tools")), None)
    tools = parse_json(tools, "tools") if isinstance(tools, str) else tools
    if tools:
        found["tools"] = _read_tools(tools)
    arguments = row.get("chat_template_kwargs")
    arguments = (
        parse_json(arguments, "chat_template_kwargs") if isinstance(arguments, str) and arguments else arguments
    )
    if arguments:
        if not isinstance(arguments, dict):
            raise RowProblem(f"chat_template_kwargs is {kind(arguments)}, not an object")
        if reserved := RESERVED & arguments.keys():
            raise RowProblem(f"chat_template_kwargs cannot set {min(reserved)}")
        _check_json(arguments, "chat_template_kwargs")
        found["chat_template_kwargs"] = arguments
    return found


def _read_tools(tools: Any) -> list[Row]:
    if not isinstance(tools, list):
        raise RowProblem(f"tools is {kind(tools)}, not a list")
    read = []
    for tool in tools:
        tool = parse_json(tool, "a tool") if isinstance(tool, str) else tool
        if isinstance(tool, dict) and not isinstance(tool.get("function"), dict):
            tool = {
                "type": "function",
                "function": {key: tool[key] for key in tool if key not in ("type", "function")},
            }
        if not isinstance(tool, dict) or not isinstance(tool["function"].get("name"), str):
            raise RowProblem("a tool has no name")
        read.append(tool)
    _check_json(read, "tools")
    return read


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


def check_encodes(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowProblem("has half a character (a lone surrogate)") from None


def parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        raise RowProblem(f"{what} is not JSON") from None


def _check_json(value: Any, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise RowProblem(f"{what} holds what JSON has not: NaN, half a character, a date") from None
