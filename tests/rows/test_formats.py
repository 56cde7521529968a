"""Rows as strangers write them: which format they are taken for, what becomes of them, what is said of bad ones.

The layouts are those of the OpenAI fine-tuning guide, LLaMA-Factory's and ms-swift's data READMEs, Axolotl's
conversation.qmd, Unsloth's datasets guide and dolly's, capybara's and similar cards; the sentences are our own.
"""

from __future__ import annotations

import copy
import json
import math
import shlex
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.errors import KitError
from kit.inspection import row_template
from kit.rows.formats import FORMATS, convert_row, detect_format
from kit.rows.turns import EmptyAnswer, RowProblem, map_role
from kit.schema.run_plan import DataSource


def source(**fields) -> DataSource:
    return DataSource(path="rows.jsonl", **fields)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def call(name: str, arguments: dict, **more) -> dict:
    return {"type": "function", **more, "function": {"name": name, "arguments": arguments}}


TIDE = {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TIDE}]
ASKED = [user("When is high tide?"), assistant("At noon.")]

GOOD = {  # name: (format, row, canonical row)
    "openai": ("messages", {"messages": [system("Short."), *ASKED]}, {"messages": [system("Short."), *ASKED]}),
    "openai with tools, arguments as text": (
        "messages",
        {
            "messages": [
                user("High tide in Husum?"),
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": '{"port": "Husum"}'}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "12:10"},
                assistant("At ten past twelve."),
            ],
            "tools": TOOLS, "parallel_tool_calls": False,
        },
        {
            "messages": [
                user("High tide in Husum?"),
                assistant("", tool_calls=[call("tide", {"port": "Husum"}, id="c1")]),
                {"role": "tool", "tool_call_id": "c1", "content": "12:10"},
                assistant("At ten past twelve."),
            ],
            "tools": TOOLS,
        },
    ),
    "tools as JSON text and bare, arguments as an object": (
        "messages",
        {"messages": [user("Tide?"), {"role": "assistant", "tool_calls": [
            {"function": {"name": "tide", "arguments": {"port": "Emden"}}}]}], "tools": json.dumps([TIDE])},
        {"messages": [user("Tide?"), assistant("", tool_calls=[call("tide", {"port": "Emden"})])], "tools": TOOLS},
    ),
    "openai's legacy functions": (
        "messages",
        {"messages": [user("Tide?"),
                      {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": "{}"}},
                      {"role": "function", "name": "tide", "content": "noon"}], "functions": [TIDE]},
        {"messages": [user("Tide?"), assistant("", tool_calls=[call("tide", {})]),
                      {"role": "tool", "name": "tide", "content": "noon"}], "tools": TOOLS},
    ),
    "openai's weight": (
        "messages",
        {"messages": [user("Hi"), assistant("Go away.", weight=0), user("Hi?"), assistant("Hello!", weight=1.0)]},
        {"messages": [user("Hi"), assistant("Go away.", weight=0), user("Hi?"), assistant("Hello!", weight=1)]},
    ),
    "axolotl's train": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi", "train": False},
                           {"from": "assistant", "value": "Hello", "train": True}]},
        {"messages": [{**user("Hi"), "weight": 0}, assistant("Hello", weight=1)]},
    ),
    "axolotl's role and value": (
        "sharegpt", {"conversations": [{"role": "user", "value": "Hi"}, {"role": "model", "value": "Hello"}]},
        {"messages": [user("Hi"), assistant("Hello")]},
    ),
    "reasoning": (
        "messages",
        {"messages": [user("2+2?"), assistant("4", reasoning="Two and two."),
                      user("3+3?"), {"role": "assistant", "thinking": "Twice three.", "content": None}]},
        {"messages": [user("2+2?"), assistant("4", reasoning_content="Two and two."),
                      user("3+3?"), assistant("", reasoning_content="Twice three.")]},
    ),
    "parts": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, "B", {"text": "C"}]},
                      assistant([{"type": "text", "text": "D", "image_url": None}])]},
        {"messages": [user("ABC"), assistant("D")]},
    ),
    "columns and keys that are not for the model": (
        "messages",
        {"id": 7, "source": "x", "system": None, "tools": None, "chat_template_kwargs": None,
         "messages": [{"id": "a", "timestamp": 5, "tool_calls": None, "name": None, "weight": None, **user("Hi")},
                      assistant("Hello", tool_calls=[], reasoning_content="", function_call=None)]},
        {"messages": [user("Hi"), assistant("Hello")]},
    ),
    "chat_template_kwargs": (
        "messages", {"messages": ASKED, "chat_template_kwargs": '{"enable_thinking": false}'},
        {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "another name": ("messages", {"dialog": ASKED, "n": 2}, {"messages": ASKED}),
    "conversations with role and content": ("messages", {"conversations": ASKED}, {"messages": ASKED}),
    "JSON in a table's cell": ("messages", {"messages": json.dumps(ASKED), "n": "2"}, {"messages": ASKED}),
    "system as a column of its own": (
        "messages", {"system": "Short.", "messages": ASKED}, {"messages": [system("Short."), *ASKED]}),
    "silence of tools and system": (
        "messages", {"messages": [system(""), user("ls"), assistant("", tool_calls=[call("ls", {})]),
                                  {"role": "tool", "content": ""}, assistant("Nothing there.")]},
        {"messages": [system(""), user("ls"), assistant("", tool_calls=[call("ls", {})]),
                      {"role": "tool", "content": ""}, assistant("Nothing there.")]},
    ),
    "tools on the system's turn": (
        "messages", {"conversations": [{**system("Short."), "tools": json.dumps(TOOLS), "tool_calls": ""}, *ASKED]},
        {"messages": [system("Short."), *ASKED], "tools": TOOLS},
    ),
    "sharegpt": (
        "sharegpt",
        {"id": "z1", "conversations": [{"from": "system", "value": "Short."}, {"from": "human", "value": "Hi"},
                                       {"from": "gpt", "value": "Hello"}]},
        {"messages": [system("Short."), user("Hi"), assistant("Hello")]},
    ),
    "sharegpt under any column, in any case": (
        "sharegpt", {"lines": [{"from": "Human", "value": "Hi"}, {"from": "ChatGPT", "value": "Hello"}]},
        {"messages": [user("Hi"), assistant("Hello")]},
    ),
    "llama-factory's tools": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Tide in Husum and Emden?"},
                           {"from": "function_call", "value": json.dumps([
                               {"name": "tide", "arguments": {"port": "Husum"}},
                               {"name": "tide", "arguments": '{"port": "Emden"}'}])},
                           {"from": "observation", "value": "noon, one"},
                           {"from": "gpt", "value": "At noon and at one."}],
         "system": "Short.", "tools": json.dumps([TIDE])},
        {"messages": [system("Short."), user("Tide in Husum and Emden?"),
                      assistant("", tool_calls=[call("tide", {"port": "Husum"}), call("tide", {"port": "Emden"})]),
                      {"role": "tool", "content": "noon, one"}, assistant("At noon and at one.")], "tools": TOOLS},
    ),
    "ms-swift's tools, calls as turns": (
        "messages",
        {"tools": json.dumps(TOOLS), "messages": [
            user("Tide?"), {"role": "tool_call", "content": '{"name": "tide", "arguments": {"port": "A"}}'},
            {"role": "tool_call", "content": '{"name": "tide", "arguments": {"port": "B"}}'},
            {"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}, assistant("So.")]},
        {"tools": TOOLS, "messages": [
            user("Tide?"), assistant("", tool_calls=[call("tide", {"port": "A"}), call("tide", {"port": "B"})]),
            {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, assistant("So.")]},
    ),
    "ms-swift's pairs": (
        "sharegpt",
        {"system": "Short.", "conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "a", "assistant": "b"}]},
        {"messages": [system("Short."), user("Hi"), assistant("Hello"), user("a"), assistant("b")]},
    ),
    "ms-swift's query and response": (
        "question_answer", {"system": "Short.", "query": "a", "response": "b", "history": [["Hi", "Hello"]]},
        {"messages": [system("Short."), user("Hi"), assistant("Hello"), user("a"), assistant("b")]},
    ),
    "a text to go on with, as an assistant's turn": (
        "messages", {"messages": [assistant("I love music")]}, {"messages": [assistant("I love music")]}),
    "alpaca": (
        "alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is ... 3"},
        {"messages": [user("Add.\n1, 2"), assistant("3")]},
    ),
    "alpaca without input": (
        "alpaca", {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"messages": [user("Say hi."), assistant("hi")]},
    ),
    "llama-factory's alpaca": (
        "alpaca",
        {"instruction": "Add.", "input": None, "output": "3", "system": "Short.", "history": [["1?", "one"]]},
        {"messages": [system("Short."), user("1?"), assistant("one"), user("Add."), assistant("3")]},
    ),
    "dolly": (
        "question_answer", {"instruction": "Who?", "context": "Ada wrote.", "response": "Ada", "category": "closed_qa"},
        {"messages": [user("Who?\nAda wrote."), assistant("Ada")]},
    ),
    "prompt and completion": (
        "prompt_completion", {"prompt": "Q: {x} A:", "completion": " b "},
        {"prompt": "Q: {x} A:", "completion": " b "}),
    "an empty prompt": (
        "prompt_completion", {"prompt": "", "completion": "b"}, {"prompt": "", "completion": "b"}),
    "prompt and completion as chats": (
        "prompt_completion",
        {"prompt": [{"role": "human", "content": "a"}], "completion": [assistant("b", id=1)], "tools": [TIDE],
         "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": [user("a")], "completion": [assistant("b")], "tools": TOOLS,
         "chat_template_kwargs": {"enable_thinking": True}},
    ),
    "input and output": (
        "question_answer", {"input": "a", "output": "b"}, {"messages": [user("a"), assistant("b")]}),
    "question and answer of a spreadsheet": (
        "question_answer", {"No": "1", "Question": "a", "Answer": "b"}, {"messages": [user("a"), assistant("b")]}),
    "text": ("text", {"text": " a\n", "meta": {"pile": "x"}}, {"text": " a\n"}),
    "axolotl's tokens": (
        "tokenized", {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
    "tokens alone": ("tokenized", {"input_ids": [5, 6], "text": "ab"}, {"input_ids": [5, 6]}),
    "padded tokens and a mask": (
        "tokenized", {"input_ids": [0, 5, 6, 0], "attention_mask": [0, 1, 1, 0], "completion_mask": [0, 0, 1, 0]},
        {"input_ids": [5, 6], "labels": [-100, 6]}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_good_row_becomes_its_canonical_row(name):
    format_, row, canonical = GOOD[name]
    before = copy.deepcopy(row)
    assert detect_format([row], source()) == format_
    assert detect_format([row], source(format=format_)) == format_
    assert convert_row(row, format_, source()) == canonical
    assert row == before


def test_the_prompts_of_alpaca_stand_as_published():
    told = source(format="alpaca_prompt")
    rows = [{"instruction": "Add {x}.", "input": "1, {2}", "output": "3"}, {"instruction": "Say hi.", "output": "hi"}]
    assert detect_format(rows, told) == "alpaca_prompt"
    assert convert_row(rows[0], "alpaca_prompt", told) == {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1, {2}\n\n### Response:",
        "completion": "3",
    }
    assert convert_row(rows[1], "alpaca_prompt", told) == {
        "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay hi.\n\n### Response:",
        "completion": "hi",
    }
    with pytest.raises(RowProblem, match="no place for history"):
        convert_row({**rows[1], "history": [["a", "b"]]}, "alpaca_prompt", told)


NAN, HALF = math.nan, "half \ud83d of it"
BAD = [  # format, row, words of the problem
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": None}, "messages is null, not a list"),
    ("messages", {"messages": 5}, "messages is a number, not a list"),
    ("messages", {"messages": "[{'role': 'user'}]"}, "messages is not JSON"),
    ("messages", {"messages": {"role": "user"}}, "messages is an object, not a list"),
    ("messages", {"messages": [user("a"), "b"]}, "turn 2: is text, not an object"),
    ("messages", {"messages": ["a", assistant("b")]}, "turn 1: is text, not an object"),
    ("messages", {"messages": [{"content": "a"}]}, "turn 1: has no role"),
    ("messages", {"messages": [{"role": 3, "content": "a"}]}, "turn 1: has no role"),
    ("messages", {"messages": [{"role": "critic", "content": "a"}]}, "'critic' is not known: dataset.roles.critic=user"),
    ("messages", {"messages": [user("a"), {"role": "assistant"}]}, "turn 2: has no content"),
    ("messages", {"messages": [user("a"), assistant(None)]}, "turn 2: has no content"),
    ("messages", {"messages": [user("a"), assistant(" \n")]}, r"turn 2: \(assistant\) is empty"),
    ("messages", {"messages": [user(""), assistant("b")]}, r"turn 1: \(user\) is empty"),
    ("messages", {"messages": [user("a"), assistant(4)]}, "turn 2: content is a number"),
    ("messages", {"messages": [user(True), assistant("b")]}, "turn 1: content is true or false"),
    ("messages", {"messages": [user(NAN), assistant("b")]}, "turn 1: content is NaN"),
    ("messages", {"messages": [user({"a": 1}), assistant("b")]}, "turn 1: content is an object"),
    ("messages", {"messages": [user("a"), assistant(HALF)]}, "turn 2: has half a character"),
    ("messages", {"messages": [system("a")]}, "no user or assistant turn"),
    ("messages", {"messages": [system("a"), user("b")]}, "no assistant turn to train"),
    ("messages", {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("b")]}, "is image_url; only text"),
    ("messages", {"messages": [user([{"type": "text", "text": None}]), assistant("b")]}, "a part of its content"),
    ("messages", {"messages": [user("a"), assistant("b", weight=2)]}, "neither 0 nor 1"),
    ("messages", {"messages": [user("a"), assistant("b", weight="1")]}, "neither 0 nor 1"),
    ("messages", {"messages": [user("a"), assistant("b", train_detail=[{"begin_offset": 0}])]}, "train_detail"),
    ("messages", {"messages": [user("a"), assistant("b", reasoning={"effort": "low"})]}, "is an object, not text"),
    ("messages", {"messages": [user("a"), assistant("", tool_calls=[{"function": {}}])]}, "a tool call has no name"),
    ("messages", {"messages": [user("a"), assistant("", tool_calls=[call("f", "port=1")])]}, "arguments of f is not JSON"),
    ("messages", {"messages": [user("a"), assistant("", tool_calls=[call("f", "[1]")])]}, "is a list, not an object"),
    ("messages", {"messages": [user("a"), assistant("", tool_calls=[call("f", '{"a": NaN}')])]}, "what JSON has not"),
    ("messages", {"messages": [user("a", ) | {"tool_calls": [call("f", {})]}, assistant("b")]}, "only an assistant does"),
    ("messages", {"messages": ASKED, "tools": "tide(port)"}, "tools is not JSON"),
    ("messages", {"messages": ASKED, "tools": [{"type": "code_interpreter"}]}, "a tool has no name"),
    ("messages", {"messages": ASKED, "tools": {"name": "tide"}}, "tools is an object, not a list"),
    ("messages", {"messages": ASKED, "chat_template_kwargs": 5}, "chat_template_kwargs is a number"),
    ("messages", {"messages": ASKED, "chat_template_kwargs": {"tokenize": False}}, "cannot set tokenize"),
    ("messages", {"messages": ASKED, "images": ["a.png"]}, "has images; only text is trained"),
    ("messages", {"messages": ASKED, "system": 5}, "system is a number"),
    ("messages", {"text": "a", "b": 1}, "has the columns text, b; the format is messages"),
    ("messages", {}, r"has the columns \(none\); the format is messages"),
    ("messages", None, "is null, not an object"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "tide()"}]}, "a tool call is not JSON"),
    ("sharegpt", {"conversations": [{"from": "user", "value": None}]}, "turn 1: has no content"),
    ("sharegpt", {"conversation": [{"human": "a", "assistant": None}]}, "turn 1: has no content"),
    ("sharegpt", {"prompt": "a", "completion": "b"}, "the format is sharegpt"),
    ("alpaca", {"instruction": "a", "input": "", "output": 3}, "output is a number"),
    ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "instruction is empty"),
    ("alpaca", {"instruction": "a", "input": NAN, "output": "b"}, "input is NaN"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["q"]]}, "not a list of pairs"),
    ("alpaca", {"instruction": "a", "output": "b", "history": 5}, "not a list of pairs"),
    ("alpaca", {"question": "a", "answer": "b"}, "has the columns question, answer; the format is alpaca"),
    ("question_answer", {"question": None, "answer": "b"}, "question is empty"),
    ("question_answer", {"question": "a", "answer": 42}, "answer is a number"),
    ("prompt_completion", {"prompt": "a", "completion": [assistant("b")]}, "both text or both chats"),
    ("prompt_completion", {"prompt": None, "completion": "b"}, "prompt is null"),
    ("prompt_completion", {"prompt": [user("a")], "completion": [user("b")]}, "completion has no assistant turn"),
    ("prompt_completion", {"prompt": [], "completion": [assistant("b")]}, "prompt is empty"),
    ("text", {"text": None}, "text is null"),
    ("text", {"text": ""}, "text is empty"),
    ("text", {"text": NAN}, "text is NaN"),
    ("text", {"text": 1.5}, "text is a number"),
    ("text", {"text": HALF}, "half a character"),
    ("text", {"messages": ASKED}, "has the columns messages; the format is text"),
    ("tokenized", {"input_ids": []}, "not a list of whole numbers"),
    ("tokenized", {"input_ids": [1, True]}, "not a list of whole numbers"),
    ("tokenized", {"input_ids": [1, 2.0]}, "not a list of whole numbers"),
    ("tokenized", {"input_ids": [1, -2]}, "input_ids holds -2"),
    ("tokenized", {"input_ids": [1, 2], "labels": [2]}, "2 input_ids, but 1 labels"),
    ("tokenized", {"input_ids": [1, 2], "labels": [2, -100]}, "not to be shifted"),
    ("tokenized", {"input_ids": [1, 2], "assistant_masks": [0, 2]}, "more than 0 and 1"),
    ("tokenized", {"input_ids": [1, 2], "attention_mask": [0, 0]}, "0 everywhere"),
    ("tokenized", {"text": "a"}, "the format is tokenized"),
]  # fmt: skip


@pytest.mark.parametrize(("format_", "row", "words"), BAD, ids=lambda value: None)
def test_a_bad_row_is_told(format_, row, words):
    with pytest.raises(RowProblem, match=words) as told:
        convert_row(row, format_, source())
    assert len(str(told.value)) < 160
    str(told.value).encode()


@pytest.mark.parametrize(
    ("format_", "row"),
    [
        ("alpaca", {"instruction": "a", "output": ""}),
        ("alpaca_prompt", {"instruction": "a", "output": None}),
        ("question_answer", {"question": "a", "answer": "\n"}),
        ("prompt_completion", {"prompt": "a", "completion": ""}),
    ],
)
def test_an_empty_answer_can_be_told_from_other_problems(format_, row):
    with pytest.raises(EmptyAnswer, match="the answer is empty"):
        convert_row(row, format_, source())


ODD = [{}, {"messages": None, "text": None}, {"x": [1, {"y": NAN}]}, {"messages": [5]}, {"text": "a text"}, {"id": 1}]


@pytest.mark.parametrize("name", GOOD)
def test_odd_rows_do_not_hide_the_format(name):
    format_, row, _ = GOOD[name]
    for odd in ODD:
        for place in (0, 2, 4):
            rows = [row] * 4
            rows.insert(place, odd)
            assert detect_format(rows, source()) == format_


def test_content_of_two_kinds_is_one_kind_wherever_it_stands():
    text = {"messages": ASKED}
    parts = {"messages": [user([{"type": "text", "text": ASKED[0]["content"]}]), ASKED[1]]}
    sharegpt = {"messages": [{"from": "human", "value": ASKED[0]["content"]}, {"from": "gpt", "value": "At noon."}]}
    for rows in ([text, text, parts, sharegpt], [parts, text, sharegpt, text], [sharegpt, parts, text, text]):
        found = detect_format(rows, source())
        assert found == "messages"
        assert [convert_row(row, found, source()) for row in rows] == [{"messages": ASKED}] * 4


# roles


def test_roles_are_mapped_and_can_be_told():
    told = source(roles={"pirate": "assistant", "Human": "system", "act": "tool_call", "ipython": "ipython"})
    assert [map_role(r, told) for r in ("pirate", "Pirate", "Human", "human", "gpt", "ipython", "developer")] == [
        "assistant", "assistant", "system", "user", "assistant", "ipython", "developer"]  # fmt: skip
    row = {"messages": [user("a"), {"role": "act", "content": '{"name": "f"}'}, {"role": "pirate", "content": "Arr"}]}
    assert convert_row(row, "messages", told)["messages"][1:] == [
        assistant("", tool_calls=[call("f", {})]),
        assistant("Arr"),
    ]
    with pytest.raises(KitError, match="'asistant' is no role"):
        detect_format([row], source(roles={"pirate": "asistant"}))


def test_the_advice_for_an_unknown_role_helps():
    row = {"messages": [{"role": "pirat", "content": "Arr?"}, assistant("Arr")]}
    with pytest.raises(RowProblem) as told:
        convert_row(row, "messages", source())
    theirs, ours = str(told.value).rsplit("dataset.roles.", 1)[1].split("=")
    assert convert_row(row, "messages", source(roles={theirs: ours}))["messages"][0] == user("Arr?")


# columns and templates


def test_columns_are_renamed():
    row = {"text": "old", "quote": "new", "author": "Ada"}
    told = source(columns={"text": "quote"})
    assert detect_format([row], told) == "text" and convert_row(row, "text", told) == {"text": "new"}
    swapped = source(columns={"prompt": "completion", "completion": "prompt"})
    assert convert_row({"prompt": "a", "completion": "b"}, "prompt_completion", swapped) == {
        "prompt": "b",
        "completion": "a",
    }
    alpaca = {"instruction": "a", "input": "", "output": "b", "text": "all of it"}
    assert detect_format([alpaca], source(columns={"text": "text"})) == "text"  # what is named goes first
    chats = {"talk": ASKED, "text": "x"}
    told = source(columns={"messages": "talk"})
    assert detect_format([chats], told) == "messages" and convert_row(chats, "messages", told) == {"messages": ASKED}
    told = source(columns={"question": "Q", "answer": "A", "system": "S"})
    assert detect_format([{"Q": "a", "A": "b", "S": "c"}], told) == "question_answer"
    assert convert_row({"Q": "a", "A": "b", "S": "c"}, "question_answer", told)["messages"][0] == system("c")


def test_columns_that_are_not_there_are_refused():
    for columns, words in (
        ({"text": "no"}, "no column 'no'; it has a, b"),
        ({"txt": "a"}, "dataset.columns.txt names"),
    ):
        with pytest.raises(KitError, match=words) as told:
            detect_format([{"a": "x"}, {"b": "y"}], source(columns=columns))
        assert told.value.problems[0].rule == "dataset-columns"


def test_a_template_decides():
    rows = [{"Q": "a {z}", "A": " b ", "n": 1}, {"Q": None, "A": "c", "n": 2}]
    chat = {"user": "{Q}?", "assistant": "{A}{n}"}
    assert detect_format(rows, source(template={"text": "{Q}{A}"})) == "text"
    assert detect_format(rows, source(template=chat)) == "messages"
    told = source(template=chat, format="prompt_completion")
    assert detect_format(rows, told) == "prompt_completion"
    assert convert_row(rows[0], "prompt_completion", told) == {
        "prompt": [user("a {z}?")],
        "completion": [assistant("b 1")],
    }
    assert convert_row(rows[0], "messages", told) == {"messages": [user("a {z}?"), assistant("b 1")]}
    assert convert_row({"A": "c"}, "text", source(template={"text": "{Q}{A}"})) == {"text": "c"}
    answers = source(template={"prompt": "{Q}", "completion": "{A}"})
    for row, problem, words in (
        ({"Q": "a", "A": " "}, EmptyAnswer, "the answer is empty"),
        ({"Q": "a", "A": None}, EmptyAnswer, "the answer is empty"),
        ({"Q": "a", "A": ["b"]}, RowProblem, "A is a list, not text"),
        ({"Q": "a", "A": NAN}, RowProblem, "A is NaN"),
        ({"x": "a"}, RowProblem, "has the columns x; the template needs Q, A"),
    ):
        with pytest.raises(problem, match=words):
            convert_row(row, "prompt_completion", answers)
    for told, words, rule in (
        (source(template=chat, columns={"text": "Q"}), "both", "dataset-template"),
        (source(template={"text": "{Z}"}), "names 'Z'; the data has Q, A, n", "dataset-template"),
        (source(template=chat, format="text"), "makes messages, not text", "dataset-format"),
    ):
        with pytest.raises(KitError, match=words) as error:
            detect_format(rows, told)
        assert error.value.problems[0].rule == rule


def test_template_parts_are_read_once():
    row_template.template_parts.cache_clear()
    for _ in range(3):
        row_template.render_row({"a": 1}, {"text": "{a}"})
    assert row_template.template_parts.cache_info().misses == 1


# refusals whose advice works


def follow(advice: str) -> DataSource:
    """The source with the overrides that an advice names."""
    fields: dict = {}
    for word in shlex.split(advice):
        if word.startswith("dataset."):
            key, value = word.removeprefix("dataset.").split("=")
            section, _, name = key.partition(".")
            if name:
                fields.setdefault(section, {})[name] = value.strip('"')
            else:
                fields[section] = value
    return source(**fields)


@pytest.mark.parametrize(
    "row",
    [
        {"quote": "To be.", "n": 1},
        {"id": "7", "Patient": "It hurts a lot.", "Doctor": "Then stop doing that."},
        {"My question": "a long one", "the (good) answer": "a longer one", "lang": "en"},
        {"chat": "some text"},
    ],
)
def test_the_advice_for_unknown_columns_works(row):
    with pytest.raises(KitError, match=f"the columns {', '.join(row).split(' (')[0]}") as told:
        detect_format([row] * 3, source())
    problem = told.value.problems[0]
    assert problem.rule == "dataset-columns"
    mended = follow(problem.fix)
    assert mended.columns
    made = convert_row(row, detect_format([row], mended), mended)
    assert all(text in json.dumps(made) for text in row.values() if isinstance(text, str) and len(text) > 3)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"speaker": "A", "utterance": "hi"}], "note": "x"},
        {"n": 1},
        {"conversations": ["hi", "there"]},
    ],
)
def test_what_is_no_text_is_not_advised_as_text(row):
    with pytest.raises(KitError) as told:
        detect_format([row], source())
    assert "dataset.columns" not in told.value.problems[0].fix


@pytest.mark.parametrize("format_", [name for name in FORMATS if name != "alpaca_prompt"])
def test_a_format_that_the_rows_have_not_is_refused_with_the_one_they_have(format_):
    for other, row, canonical in GOOD.values():
        told = source(format=format_)
        try:
            assert detect_format([row], told) == format_
            continue  # a row can be two things: alpaca's also have a text
        except KitError as error:
            problem = error.problems[0]
        assert problem.rule == "dataset-format" and format_ in problem.problem
        assert problem.fix == f"dataset.format={other}"
        assert convert_row(row, detect_format([row], follow(problem.fix)), source()) == canonical


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"prompt": "a", "chosen": "good", "rejected": "bad"}, {"prompt": "a", "completion": "good"}),
        ({"prompt": [user("a")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
         {"prompt": [user("a")], "completion": [assistant("good")]}),
        ({"prompt": "a", "chosen": [user("a"), assistant("good")], "rejected": [user("a"), assistant("bad")]},
         {"messages": [user("a"), assistant("good")]}),
        ({"instruction": "a", "input": "b", "chosen": "good", "rejected": "bad"},
         {"messages": [user("a\nb"), assistant("good")]}),
        ({"question": "a", "chosen": "good", "rejected": "bad"}, {"messages": [user("a"), assistant("good")]}),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "good"},
          "rejected": {"from": "gpt", "value": "bad"}}, None),
        ({"messages": ASKED, "rejected_response": "bad"}, None),
        ({"messages": ASKED, "label": False}, None),
        ({"instruction": "a", "output": "b", "kto_tag": True}, None),
    ],
)  # fmt: skip
def test_preferences_are_refused_and_the_better_answers_can_be_trained(row, trained):
    with pytest.raises(KitError, match="preferences") as told:
        detect_format([row] * 2, source())
    mended = follow(told.value.problems[0].fix)
    assert bool(mended.columns) == bool(trained)
    if trained:
        assert convert_row(row, detect_format([row], mended), mended) == trained


def test_no_rows():
    with pytest.raises(KitError, match="holds no rows") as told:
        detect_format([], source())
    assert told.value.problems[0].rule == "dataset-rows"
    assert detect_format([{"messages": []}, {"messages": None}], source()) == "messages"  # each row says what it lacks


# whatever stands in a file


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(HALF)
    | st.binary(max_size=2)
)
words = st.sampled_from([
    *("messages", "conversations", "from", "value", "role", "content", "user", "assistant", "human", "gpt", "tool"),
    *("function_call", "tool_calls", "function", "name", "arguments", "weight", "reasoning", "tools", "prompt", "text"),
    *("completion", "instruction", "output", "input", "history", "question", "answer", "input_ids", "labels", "type"),
    *("attention_mask", "chat_template_kwargs", "system", "chosen", "rejected", "train_detail", "{}", "[]", "[{}]"),
    *('[{"role": "user", "content": "a"}]', '[{"name": 5}]', "context", "completion_mask", "images", "turns"),
])  # fmt: skip
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=3), inner, max_size=5),
    max_leaves=25,
)
turns = st.lists(st.fixed_dictionaries({"role": words, "content": values}, optional={
    name: values for name in ("tool_calls", "function_call", "weight", "reasoning", "name", "tools", "value")}), max_size=4)  # fmt: skip
rows_ = st.dictionaries(words, values | turns, max_size=6) | st.fixed_dictionaries({"messages": turns}) | values


def same(a, b) -> bool:
    return repr(a) == repr(b)  # NaN is not NaN


@settings(max_examples=60, deadline=None)  # `soak.py --only data` has many
@given(rows_, st.sampled_from(sorted(FORMATS)), st.booleans())
def test_any_row_is_converted_or_told(row, format_, renamed):
    told = source(columns={"messages": "turns", "text": "value"} if renamed else {}, roles={"tool": "human"})
    told = told if renamed else source()
    before = copy.deepcopy(row)
    try:
        made = convert_row(row, format_, told)
    except RowProblem as problem:
        str(problem).encode()
    else:
        json.dumps(made, allow_nan=False, ensure_ascii=False).encode()
        assert all(None not in message.values() for message in made.get("messages", ()))
        assert all(isinstance(message["content"], str) for message in made.get("messages", ()))
    assert same(row, before)


@settings(max_examples=40, deadline=None)
@given(st.lists(rows_, max_size=4), st.sampled_from(["auto", *FORMATS]))
def test_any_rows_have_a_format_or_are_refused(rows, format_):
    try:
        assert detect_format(rows, source(format=format_)) in FORMATS
    except KitError as error:
        assert all(problem.fix for problem in error.problems)
        str(error).encode()


def test_deep_rows():
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for row in ({"messages": ASKED, "tools": deep}, {"messages": ASKED, "chat_template_kwargs": {"a": deep}}):
        with pytest.raises(RowProblem):
            convert_row(row, "messages", source())
    with pytest.raises(RowProblem, match="tools is not JSON"):
        convert_row({"messages": ASKED, "tools": "[" * 100_000}, "messages", source())
    while isinstance(deep, list):  # freed level by level: some interpreters recurse
        deep = deep.pop()


def test_a_plain_chat_takes_microseconds():
    row, told = {"messages": [system("s"), user("a" * 300), assistant("b" * 900), user("c")]}, source()
    count = 2000
    begin = time.perf_counter()
    for _ in range(count):
        convert_row(row, "messages", told)
    assert (time.perf_counter() - begin) / count < 60e-6  # about 6 on a quiet machine


def test_formats_need_the_standard_library_alone():
    heavy = "torch transformers trl datasets numpy pyarrow"
    code = f"import kit.rows.formats, sys; assert not set({heavy.split()!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
