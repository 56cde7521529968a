"""`kit list` and `kit show`: every recipe and every choice can be found and read."""

from __future__ import annotations

import pytest
import yaml

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, REFUSED
from kit.explain import catalog
from kit.system import paths


def out(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.run_verb(list(argv)) == DONE
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.run_verb(list(argv)) == REFUSED
    return capsys.readouterr().err


def test_list_names_recipes_and_beside_them_the_groups(capsys):
    assert cli.run_verb(["list"]) == DONE
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == sorted(f.stem for f in paths.RECIPES.glob("*.yaml"))
    assert all(group in shown.err for group in ("model", "dataset", "deepspeed", "peft"))


@pytest.mark.parametrize("file", sorted(paths.RECIPES.glob("*.yaml")), ids=lambda f: f.stem)
def test_list_says_what_a_recipe_is(file, capsys):
    """Model, method, data and engine are those that it composes to; hardware and memory stand in its first lines."""
    name, trained, data, engine, hardware, memory = catalog.describe_recipe(file)
    plan = api.compose(f"recipe={name}", *(["model.name_or_path=x"] if "opt_6b7" in name else []))
    method = "full" if plan.peft is None else "dora" if plan.peft.get("use_dora") else "lora"
    bits = "4-bit " if "load_in_4bit" in (plan.quantization or {}) else "8-bit " if plan.quantization else ""
    assert trained.endswith(f", {bits}{method}") and (paths.CONF / "dataset" / f"{data}.yaml").is_file()
    assert engine.startswith(f"zero{plan.zero_stage}") if plan.deepspeed else engine == "one process"
    text = " ".join(line.lstrip("# ") for line in file.read_text().splitlines()[:5])
    assert f"Hardware: {hardware}. Expected: {memory}" in text and "GB" in memory
    assert f"{name} {trained} {data} " in " ".join(out(capsys, "list").split())


@pytest.mark.parametrize("group", [g for g in catalog.list_groups() if g != catalog.RECIPE])
def test_list_names_every_choice_with_its_first_line(group, capsys):
    lines = out(capsys, "list", group).splitlines()
    for file in catalog.choice_files(group):
        [line] = [line for line in lines if line.split()[0:1] == [file.stem]]
        first = catalog.first_comment(file)
        assert line == f"{line.split()[0]}{' ' * (line.index(first) - len(file.stem))}{first}" if first else file.stem


def test_list_of_models_says_what_each_is(capsys):
    text = out(capsys, "list", "model")
    [line] = [line for line in text.splitlines() if line.startswith("llama3_1_8b ")]
    assert "8.0B parameters" in line and "gated" in line


def test_show_prints_the_file_as_it_is(capsys):
    file = paths.CONF / "model" / "llama3_1_8b.yaml"
    assert out(capsys, "show", "model/llama3_1_8b") == file.read_text()
    assert out(capsys, "show", "llama3_1_8b") == file.read_text()
    assert out(capsys, "show", "deepspeed/zero2") == (paths.DS_CONFIGS / "zero2.json").read_text()


def test_show_of_a_recipe_says_what_it_composes_to_and_stays_yaml(capsys):
    text = out(capsys, "show", "quickstart")
    file = paths.RECIPES / "quickstart.yaml"
    assert text.startswith(file.read_text())
    assert yaml.safe_load(text) == yaml.safe_load(file.read_text())
    added = text[len(file.read_text()) :]
    for word in ("quickstart/base", "LORA", "local", "16 rows", "letters_train.jsonl"):
        assert word in added


def test_a_recipe_goes_before_a_choice_of_the_same_name(capsys):
    recipe, preset = (catalog.find_choice(n)[0] for n in ("quickstart_base", "model/quickstart_base"))
    assert (recipe, preset) == ("recipe", "model")
    assert out(capsys, "show", "recipe/quickstart_base") == out(capsys, "show", "quickstart_base")


def test_show_of_a_recipe_that_cannot_be_composed_says_why(tmp_path, monkeypatch):
    """A recipe may leave the data to its user."""
    monkeypatch.setattr(
        "kit.api.compose", lambda *args: (_ for _ in ()).throw(catalog.KitError("dataset.path is not given"))
    )
    assert catalog.summarize_recipe("quickstart") == [
        "nothing yet: dataset.path is not given (kit check recipe=quickstart)"
    ]


UNKNOWN = [
    ("quickstrt", "kit show quickstart?"),
    ("model/llama31_8b", "kit show model/llama3_1_8b?"),
    ("llama3_1_8", "kit show model/llama3_1_8b?"),
    ("modl/gpt2", "kit show model/gpt2"),
    ("zzz", "kit list"),
    ("model/zzz", "kit list model"),
    ("none", "kit show model/none or"),
    ("../train", "one of"),
    ("", "kit list"),
]


@pytest.mark.parametrize("name, fix", UNKNOWN)
def test_names_that_are_none_or_several(name, fix, capsys):
    assert fix in refused(capsys, "show", name)


def test_a_group_that_is_none(capsys):
    assert "kit list model?" in refused(capsys, "list", "modell")
