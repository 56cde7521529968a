"""What people get wrong (broken.txt) is refused by the rule that is meant, with its key; valid.txt passes silently."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_rules import FIRES, HERE

from kit import api
from kit.config.rules.table import RULES
from kit.errors import KitError

FOLDER = Path(__file__).parent
WORDS = re.compile(r"(?:[^\s'{]|'[^']*'|\{[^}]*\})+")  # overrides, quotes and blocks whole, as a shell hands them on
# What neither list can bring about here, and where it is: by the machine, the Hub, or another file of tests.
ELSEWHERE = {
    "hub": "tests/test_fetch.py", "offline": "tests/test_fetch.py", "dataset-configuration": "tests/test_fetch.py",
    "section": "tests/test_cli_check.py",
    "doubled": "tests/config/test_deepspeed_file.py", "literal": "tests/config/test_deepspeed_file.py",
    "init-from-files": "tests/config/test_init_from.py", "init-from-base": "tests/config/test_init_from.py",
    "vocabulary": "tests/config/test_tokenizer.py", "added-tokens": "tests/config/test_tokenizer.py",
    "token-indices-tied": "tests/config/test_tokenizer.py", "chat-template": "tests/config/test_tokenizer.py",
    "special-token-missing": "tests/config/test_tokenizer.py",
    "missing-key": "tests/config/test_fields.py", "removed-key": "tests/config/test_fields.py",
    "hidden-size": "tests/config/test_zero.py",
}  # fmt: skip


def lines(name: str) -> list[str]:
    return [x for x in (FOLDER / name).read_text().splitlines() if x and not x.startswith("#")]


BROKEN = [tuple(part.strip() for part in line.split(" | ")) for line in lines("broken.txt")]
VALID = lines("valid.txt")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


def make_files(folder: Path) -> Path:
    """What the lines name: data, DeepSpeed JSON and models, most of them broken."""
    rows = {
        "texts.jsonl": [{"text": "one"}, {"text": "two"}], "odd.jsonl": [{"question": "q", "answer": "a"}] * 4,
        "strange.jsonl": [{"a": "q", "b": "a"}] * 4,
        "pairs.jsonl": [{"prompt": "p", "completion": "c"}] * 4, "empty.jsonl": [], "rows.xyz": [{"text": "x"}],
    }  # fmt: skip
    for name, each in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "torn.jsonl").write_text('{"text": "on')
    (folder / "wide.jsonl").write_bytes('{"text": "one"}\n'.encode("utf-16"))
    (folder / "latin.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    (folder / "bool.json").write_text('{"zero_optimization": true}')
    (folder / "empty.json").write_text("{}")
    (folder / "comment.json").write_text('{\n  // stage\n  "zero_optimization": {"stage": 2}\n}')
    (folder / "twice.json").write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}')
    (folder / "plain.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}')
    (folder / "broken_model").mkdir()
    (folder / "broken_model" / "config.json").write_text('{"model_type": "llama", ')
    (folder / "pickled_model").mkdir()
    (folder / "pickled_model" / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    (folder / "pickled_model" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "code.yaml").write_text("model:\n  trust_remote_code: true\n")
    (folder / "torn.yaml").write_text("trainer: [")
    return folder


@pytest.fixture
def ask(base: Path, chat: Path, files: Path, monkeypatch: pytest.MonkeyPatch):
    """The plan of a line of overrides on a tiny model with chats, as far as the line does not name its own."""
    monkeypatch.chdir(files)

    def compose(line: str):
        own = WORDS.findall(line)
        heads = {o.partition("=")[0] for o in own}
        stock = [] if {"model", "model.name_or_path", "recipe"} & heads else [f"model.name_or_path={base}"]
        stock += [] if {"dataset.path", "recipe"} & heads else [f"dataset.path={chat}"]
        stock += [] if {"trainer.max_length", "recipe"} & heads else ["trainer.max_length=128"]
        return api.compose(*stock, *own)

    return compose


def test_there_are_enough_of_both():
    assert len(set(BROKEN)) == len(BROKEN) >= 150 and len(set(VALID)) == len(VALID) >= 60


def test_every_rule_is_broken_somewhere():
    covered = {rule for rule, _, _ in BROKEN} | set(FIRES) | HERE
    assert covered | set(ELSEWHERE) == {rule.id for rule in RULES}
    assert not covered & set(ELSEWHERE), "it is shown here after all"
    root = FOLDER.parents[1]
    assert all(rule in (root / place).read_text() or (root / place).is_file() for rule, place in ELSEWHERE.items())


@pytest.mark.parametrize("rule, key, line", BROKEN, ids=lambda part: part[:60])
def test_broken(rule: str, key: str, line: str, ask):
    with pytest.raises(KitError) as refused:
        ask(line)
    problems = refused.value.problems
    assert any(p.rule == rule and (key in p.where or key in p.problem) for p in problems), [
        (p.rule, p.where, p.problem) for p in problems
    ]
    assert all(p.fix for p in problems), problems


@pytest.mark.parametrize("line", VALID, ids=lambda line: line[:60])
def test_valid(line: str, ask):
    assert [w["rule"] for w in ask(line).warnings] == []
