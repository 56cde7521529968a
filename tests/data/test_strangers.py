"""What people's data did to the kit and to other tools without a word, or late: each is right now, or named by its row.

| what it was | met in | shown by |
|---|---|---|
| the column `tools` does not reach the template | trl 3597 | test_tools_reach_the_template |
| the roles human, gpt, bot, User, model: an empty chat is trained | axolotl 752 | test_roles_of_other_tools |
| rows cut away by max_length, unmentioned | trl 3927 | test_rows_without_anything_left_are_named |
| turns of weight 0 are trained | OpenAI's format | test_a_turn_of_weight_0_is_not_trained |
| arguments of a tool call as JSON text: encoded twice, or lost | OpenAI's format | test_arguments_as_text_and_as_objects |
| templates that write today's date: other tokens tomorrow | Llama 3.2, gpt-oss | test_the_same_tokens_tomorrow |
| text without BOS though the tokenizer says add_bos_token | DeepSeek V3 | test_text_begins_with_bos_where_the_tokenizer_says_so |
| the training twin of a template has another generation prompt | DeepSeek V3 | test_a_prompt_ends_as_the_tokenizers_own |
| an empty cell, "NA", null, numbers | AttributeError 'endswith' | test_cells_that_are_no_text |
| rows of several formats in one file | late, without a row | test_mixed_formats_are_named_by_their_rows |
| prompt and completion as chats, and no chat template | late, without a row | test_chats_without_a_template |
| ShareGPT, Alpaca | refused | test_files_of_other_tools |
| .gz, .zst, globs, lists, save_to_disk | refused | test_files_in_any_wrapping |
| rows of token ids | refused | test_tokens_as_they_are |
| macOS's ._ files are read | UnicodeDecodeError | test_files_that_macos_leaves |
| several data sets | refused | test_several_data_sets |
| a folder that does not exist is a Hub id, "valid" | | test_a_folder_that_is_not_there |
| advice that leads to a run that trains nonsense | | test_advice_for_columns_that_are_no_text |
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
from conftest import write_rows
from test_generate import CHATML, make_tokenizer

from kit import api
from kit.data import prepare
from kit.data.encode import IGNORED, encode_prompt, make_encoding
from kit.errors import KitError
from kit.inspection.tokenizer import find_chat_template, named_templates
from kit.models.load import load_tokenizer

SPECIAL = re.compile(r"<\|?/?[A-Za-z_0-9]+\|?>|<｜[^｜<>]+｜>|\[/?[A-Z_]+\]")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


class World:
    """A folder with the tiny model, a tokenizer of bytes, and data."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder = folder
        self.model = Path(shutil.copytree(base, folder / "model"))
        config = json.loads((self.model / "config.json").read_text())
        config |= {"vocab_size": 512, "max_position_embeddings": 4096}
        (self.model / "config.json").write_text(json.dumps(config))
        self.use_template(CHATML)

    def use_template(self, template: str | None, bos: str | None = None, **settings) -> None:
        tokenizer = make_tokenizer()
        known = set(tokenizer.get_vocab())
        tokenizer.add_tokens(sorted({*SPECIAL.findall(template or ""), *([bos] if bos else [])} - known), True)
        if bos:
            tokenizer.bos_token = bos
        tokenizer.chat_template = template
        (self.model / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(self.model)
        file = self.model / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def write(self, rows: list[dict], name: str = "rows.jsonl") -> Path:
        return write_rows(self.folder / name, rows)

    def plan(self, data: list[dict] | Path | None, *overrides: str):
        file = self.write(data) if isinstance(data, list) else data
        given = {o.partition("=")[0] for o in overrides}
        stock = [f"model.name_or_path={self.model}", "trainer.use_cpu=true"]
        stock += [] if "trainer.max_length" in given else ["trainer.max_length=4096"]
        stock += [f"dataset.path={file}"] if file else []
        return api.compose(*stock, *overrides)

    def prepare(self, data: list[dict] | Path | None, *overrides: str) -> prepare.PreparedData:
        plan = self.plan(data, *overrides)
        self.tokenizer = load_tokenizer(plan)
        return prepare.open_prepared(prepare.prepare_data(plan, self.tokenizer))

    def texts(self, data: list[dict] | Path | None, *overrides: str) -> list[tuple[str, str]]:
        """(the row, what of it is in the loss) of each prepared row, as text."""
        rows = self.prepare(data, *overrides).train
        kept = [[i for i in labels if i != IGNORED] for labels in rows["labels"]]
        decode = self.tokenizer.decode
        return [(decode(ids), decode(k)) for ids, k in zip(rows["input_ids"], kept, strict=True)]

    def refusal(self, data: list[dict] | Path | None, *overrides: str) -> str:
        with pytest.raises(KitError) as refused:
            self.prepare(data, *overrides)
        assert refused.value.code == 2 and all(p.fix and p.rule for p in refused.value.problems)
        return str(refused.value)


@pytest.fixture
def world(tmp_path: Path, base: Path) -> World:
    return World(tmp_path, base)


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


TOOL = {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip


def template_of(name: str) -> str:
    return find_chat_template(name).read_text(encoding="utf-8")


# ---- silent ----


def test_tools_reach_the_template(world):
    world.use_template(template_of("qwen3"))
    row = chat("what is 1 and 2?", "3", tools=[TOOL])
    [(text, _)] = world.texts([row])
    assert '"name": "add"' in text and "Add two numbers." in text
    theirs = world.tokenizer.apply_chat_template(row["messages"], tools=[TOOL], return_dict=True)["input_ids"]
    assert world.prepare([row]).train[0]["input_ids"] == theirs
    as_text = chat("what is 1 and 2?", "3", tools=json.dumps([TOOL]))
    assert world.prepare([as_text]).train[0]["input_ids"] == theirs


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("User", "bot"), ("user", "model"), ("HUMAN", "AI")])
def test_roles_of_other_tools(asks, answers, world):
    world.use_template(template_of("qwen2_5"))
    turns = [{"role": asks, "content": "a question"}, {"role": answers, "content": "an answer"}]
    told = [{"from": asks, "value": "a question"}, {"from": answers, "value": "an answer"}]
    expected = world.texts([chat("a question", "an answer")], "dataset.train_on=assistant_turns")
    assert expected[0][1].strip() == "an answer<|im_end|>"
    assert world.texts([{"messages": turns}], "dataset.train_on=assistant_turns") == expected
    assert world.texts([{"conversations": told}], "dataset.train_on=assistant_turns") == expected


def test_a_role_that_nobody_knows_is_named_with_its_row(world):
    rows = [
        chat("a", "b"),
        {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    said = world.refusal(rows)
    assert "rows.jsonl row 2: turn 1: the role 'narrator' is not known: dataset.roles.narrator=user" in said
    assert "<|im_start|>user\nx<|im_end|>" in world.texts(rows, "dataset.roles.narrator=user")[1][0]


def test_rows_without_anything_left_are_named(world):
    rows = [chat("q" * 90, "a"), chat("q", "a"), chat("q" * 95, "a"), chat("q" * 99, "a")]
    said = world.refusal(rows, "trainer.max_length=64", "dataset.train_on=assistant_turns")
    assert "3 of 4 rows of train" in said and "row 1" in said and "row 4" in said and "max_length=64" in said
    data = world.prepare(rows, "trainer.max_length=64")
    assert "train: 3 rows: cut" in data.notes


def test_a_turn_of_weight_0_is_not_trained(world):
    turns = [*chat("q1", "a1")["messages"], *chat("q2", "a2")["messages"]]
    rows = [{"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]}]
    for train_on in ("everything", "assistant_turns"):
        [(text, trained)] = world.texts(rows, f"dataset.train_on={train_on}")
        assert "a1" in text and "a1" not in trained and "a2<|im_end|>" in trained
    rows[0]["messages"][3]["weight"] = 0
    assert "every weight is 0" in world.refusal(rows, "dataset.train_on=assistant_turns")


ARGUMENTS = {  # templates of both kinds: one writes the arguments with tojson, the other as they come
    "object": "{{ c.function.arguments | tojson }}",
    "text": "{% if c.function.arguments is string %}{{ c.function.arguments }}{% endif %}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_as_text_and_as_objects(kind, world):
    calls = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} " + ARGUMENTS[kind] + "</call>{% endfor %}"
    world.use_template(CHATML.replace("{{ m.content }}", "{{ m.content or '' }}" + calls))
    arguments = {"a": 1, "city": "Köln", "deep": {"x": [1, None]}}
    texts = set()
    for given in (arguments, json.dumps(arguments), json.dumps(arguments, ensure_ascii=False)):
        call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": given}}
        turns = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "content": "3"},
            {"role": "assistant", "content": "3"},
        ]
        texts |= set(world.texts([{"messages": turns}]))  # fmt: skip
    [(text, _)] = texts
    assert json.loads(re.search(r"<call>add (.*?)</call>", text)[1]) == arguments


@pytest.mark.parametrize("name", ["llama3_2", "gptoss"])
def test_the_same_tokens_tomorrow(name, world, monkeypatch):
    import datetime

    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2031, 5, 6)

    world.use_template(template_of(name))
    plan = world.plan([chat("q", "a")])
    today = datetime.date.today()
    assert plan.tokenizer.date == today.isoformat()
    tokenizer = load_tokenizer(plan)

    def text() -> str:
        shutil.rmtree(world.folder / "cache", ignore_errors=True)
        return tokenizer.decode(prepare.open_prepared(prepare.prepare_data(plan, tokenizer)).train[0]["input_ids"])

    first = text()
    assert str(today.year) in first
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert "2031" in tokenizer.apply_chat_template(chat("q", "a")["messages"], tokenize=False)
    assert text() == first


def test_text_begins_with_bos_where_the_tokenizer_says_so(world):
    rows = [{"text": "plain text"}, {"text": "<s>it has one"}]
    world.use_template(CHATML, bos="<s>", add_bos_token=True)
    assert [text for text, _ in world.texts(rows)] == ["<s>plain text<|eos|>", "<s>it has one<|eos|>"]
    assert world.texts([{"prompt": "1+1=", "completion": "2"}]) == [("<s>1+1=2<|eos|>", "2<|eos|>")]
    world.use_template(CHATML, bos="<s>")
    assert world.texts(rows)[0][0] == "plain text<|eos|>"


def test_a_prompt_ends_as_the_tokenizers_own(world):
    """What is trained begins where an answer will begin; a template for training alone is never advised."""
    world.use_template(template_of("deepseekv3"), bos="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>")
    row = chat("a question", "an answer")
    [(text, trained)] = world.texts([row], "dataset.train_on=assistant_turns")
    own = world.tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    common = os.path.commonprefix([own, text])  # the prompt may open a thought that a finished turn does not have
    assert (
        trained == "an answer<｜end▁of▁sentence｜>"
        and text == common + trained
        and own[len(common) :].strip() == "<think>"
    )
    prompt = encode_prompt(world.tokenizer, row["messages"][:1], chat=True, encoding=make_encoding(world.tokenizer))
    assert world.tokenizer.decode(prompt) == own
    world.use_template(None)
    tokens = SPECIAL.findall(" ".join(f.read_text() for f in named_templates().values()))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(sorted({*tokens} - set(tokenizer.get_vocab())), True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(world.model)
    assert "tokenizer.chat_template=" in (said := world.refusal([row])) and "_training" not in said


# ---- late, and without a row ----


def test_cells_that_are_no_text(world):
    file = world.folder / "cells.csv"
    file.write_text('text\nfirst\nNA\n12\n""\nnull\n')
    said = world.refusal(file)
    assert "cells.csv row 4: text is empty" in said and said.count("cells.csv row") == 1
    texts = world.texts(file, "dataset.on_bad_row=drop", "dataset.max_bad_rows=1")
    assert [text for text, _ in texts] == [f"{cell}<|eos|>" for cell in ("first", "NA", "12", "null")]
    rows = [{"text": "a"}, {"text": None}, {"text": 7}, {"text": float("nan")}, {"text": ["a"]}, {}]
    said = world.refusal(rows)
    for number, reason in ((2, "text is null, not text"), (3, "text is a number, not text"), (4, "text is NaN")):
        assert f"rows.jsonl row {number}: {reason}" in said


def test_mixed_formats_are_named_by_their_rows(world):
    rows = [chat("q", "a")] * 3 + [{"text": "plain"}] + [{"prompt": "p", "completion": "c"}]
    said = world.refusal(rows)
    assert "row 4: has the columns text; the format is messages" in said and "row 5: has the columns prompt" in said
    late = [chat("q", f"a{n}") for n in range(300)] + [{"text": "plain"}]  # behind what the check looks at
    assert "row 301: has the columns text; the format is messages" in world.refusal(late)


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
def test_chats_without_a_template(kind, world):
    world.use_template(None)
    turns = chat("q", "a")["messages"]
    rows = [{"messages": turns} if kind == "messages" else {"prompt": turns[:1], "completion": turns[1:]}] * 2
    plan = [f"model.name_or_path={world.model}", f"dataset.path={world.write(rows)}"]
    [problem] = [p for p in api.check(*plan) if p.rule == "chat-template"]
    name = re.match(r"tokenizer\.chat_template=(\w+) \(its tokens are in the vocabulary", problem.fix)[1]
    assert world.texts(rows, f"tokenizer.chat_template={name}")[0][0].count("<|im_start|>") >= 2


# ---- missing ----


def test_files_of_other_tools(world):
    """ShareGPT and Alpaca by their columns alone, and what is trained of them."""
    sharegpt = [{"id": "1", "conversations": [{"from": "system", "value": "be kind"}, {"from": "human", "value": "q"},
                                              {"from": "gpt", "value": "a"}]}]  # fmt: skip
    alpaca = [
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "so"},
    ]
    assert world.plan(sharegpt).dataset.format == "sharegpt"
    answers = "trainer.assistant_only_loss=true"
    assert world.texts(sharegpt, answers) == [
        ("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
         "a<|im_end|>")
    ]  # fmt: skip
    assert world.plan(alpaca).dataset.format == "alpaca"
    assert [trained for _, trained in world.texts(alpaca, answers)] == ["done<|im_end|>", "so<|im_end|>"]
    prompts = world.texts(alpaca, "dataset.format=alpaca_prompt")
    assert prompts[0][0].startswith("Below is an instruction that describes a task, paired with an input")
    assert "### Input" not in prompts[1][0] and prompts[1][1] == "so<|eos|>"


def test_files_in_any_wrapping(world):
    import pyarrow as pa
    from datasets import Dataset, DatasetDict

    rows = [{"text": f"row {n}"} for n in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (world.folder / "one.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(str(world.folder / "one.jsonl.zst"), "zstd") as out:
        out.write(text)
    halves = [write_rows(world.folder / f"part-{n}.jsonl", rows[3 * n : 3 * n + 3]) for n in (0, 1)]
    Dataset.from_list(rows).save_to_disk(str(world.folder / "saved"))
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:2])}).save_to_disk(
        str(world.folder / "saved_dict")
    )
    Dataset.from_list(rows).to_parquet(str(world.folder / "one.parquet"))
    expected = world.texts(rows)
    for place in ("one.jsonl.gz", "one.jsonl.zst", "one.parquet", "saved", "saved_dict", "part-*.jsonl",
                  f"[{halves[0]},{halves[1]}]"):  # fmt: skip
        assert world.texts(None, f"dataset.path={place}") == expected, place
    data = world.prepare(None, "dataset.path=saved_dict", "dataset.eval_split=test")
    assert (len(data.train), len(data.test)) == (6, 2)


def test_tokens_as_they_are(world):
    rows = [
        {"input_ids": [65, 66, 257], "labels": [-100, 66, 257]},
        {"input_ids": [65, 66, 257], "attention_mask": [1] * 3},
    ]
    assert world.plan(rows).dataset.format == "tokenized"
    data = world.prepare(rows)
    assert data.train["labels"][:] == [[-100, 66, 257], [65, 66, 257]]
    assert "row 1: it holds the token 400" in world.refusal([{"input_ids": [400]}])
    assert "3 input_ids, but 2 labels" in world.refusal([{"input_ids": [1, 2, 3], "labels": [1, 2]}])


def test_files_that_macos_leaves(world):
    folder = world.folder / "data"
    folder.mkdir()
    write_rows(folder / "rows.jsonl", [{"text": "a"}])
    (folder / "._rows.jsonl").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X" + b"\0" * 100)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert world.texts(None, f"dataset.path={folder}") == [("a<|eos|>", "a<|eos|>")]


def test_several_data_sets(world):
    a = world.write([{"text": f"t{n}"} for n in range(4)], "a.jsonl")
    b = world.write([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}], "b.jsonl")
    data = world.prepare(None, f"dataset.mix=[{{path: '{a}', limit: 3}}, {{path: '{b}'}}]")
    assert len(data.train) == 4 and data.report["splits"]["train"]["sources"] == {"0": 3, "1": 1}
    both = [f"model.name_or_path={world.model}", f"dataset.path={a}", f"dataset.mix=[{{path: '{b}'}}]"]
    assert any("are both given" in p.problem for p in api.check(*both))


# ---- what was said of them ----


def test_a_folder_that_is_not_there(world):
    stock = [f"model.name_or_path={world.model}", "trainer.use_cpu=true"]
    (world.folder / "data").mkdir()
    [problem] = api.check(*stock, "dataset.path=data/chats")
    assert "no Hub id either: the folder data is here" in problem.problem and problem.fix
    for path in ("./other/chats", "other/chats.jsonl", "other/more/chats", "../chats"):
        assert [p.rule for p in api.check(*stock, f"dataset.path={path}")] == ["dataset-files"], path
    plan = api.compose(*stock, "dataset.path=other/chats", here=False)  # it may be one: then that is said
    assert "other/chats is not on this machine: taken for a Hub data set" in "".join(plan.notes)
    assert [p.rule for p in api.check(*stock, "dataset=data/chats")] == ["data-word"]


@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "dialogue_turns": [{"speaker": "A", "utterance": "q"}, {"speaker": "B", "utterance": "a"}]},
        {"id": 1, "conversations": [["q", "a"]]},
        {"id": 1, "conversations": [{"a": "q"}]},
        {"pairs": {"q": "a"}},
    ],
)
def test_advice_for_columns_that_are_no_text(row, world):
    """A list is no text: it is not what dataset.columns.text can name."""
    stock = [f"model.name_or_path={world.model}", f"dataset.path={world.write([row] * 3)}"]
    for problem in api.check(*stock):
        assert problem.fix and "columns.text" not in problem.fix and "columns.question" not in problem.fix
        column = next(name for name in row if name != "id")
        assert column in str(problem) and problem.rule in ("dataset-columns", "bad-rows")
    assert api.check(*stock), "it is refused"
    column = next(name for name in row if name != "id")
    forced = api.check(*stock, f"dataset.columns.text={column}")
    assert forced, "nor does the check call it valid"


@pytest.mark.parametrize("columns", [("a", "b"), ("body",)])
def test_advice_is_taken(columns, world):
    """What is advised for unknown columns of text is accepted, and trains these columns."""
    data = [{name: tiny.sentence(n, 3 + len(name)) for name in columns} for n in range(4)]
    stock = [f"model.name_or_path={world.model}", "trainer.use_cpu=true", f"dataset.path={world.write(data)}"]
    [problem] = api.check(*stock)
    assert problem.rule == "dataset-columns"
    texts = world.texts(world.folder / "rows.jsonl", *problem.fix.split())
    assert all(row[name] in text for row, (text, _) in zip(data, texts, strict=True) for name in columns)
