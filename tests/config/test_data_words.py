"""A file is enough: `kit train my.jsonl`, `dataset=my.jsonl`, folders, globs, several files, and what is no data."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kit.cli import verbs as cli
from kit.config import compose as composing
from kit.config.compose import compose, parse_overrides
from kit.config.data_words import hydra_text, split_at_commas
from kit.errors import DONE, REFUSED, KitError

ODD_NAMES = [
    "my data.jsonl", "a,b.jsonl", "a=b.jsonl", "[x].jsonl", "{x}.jsonl", "数据 é.jsonl", 'a"b.jsonl', "it's.jsonl",
    "a\\b.jsonl", 'a\\"b.jsonl', "${x}.jsonl", "$x.jsonl", "a:b(c).jsonl", "100%#y.jsonl", "1.jsonl", "a-b_c.CSV",
    "rows.jsonl.gz", "rows.json.zst", "rows.parquet", "rows.arrow", "rows.txt", "x+y~z@w.tsv",
    "sub/with space/r.jsonl",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [*ODD_NAMES, "home/at home.jsonl", "chats/1.jsonl", "chats/2.jsonl", "a.jsonl", "b.jsonl", "odd.dat"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"text": "a"}\n', encoding="utf-8")
    return tmp_path


def path_of(*args: str, config_dir: str | None = None):
    return compose(list(args), config_dir).tree["dataset"]["path"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_under_any_name(name: str, here: Path):
    assert path_of(name) == path_of(f"dataset={name}") == name
    absolute = str(here / name)
    assert path_of(absolute, "model=gpt2") == path_of(f"dataset={absolute}") == absolute
    assert path_of(f"./{name}") == f"./{name}"
    assert path_of(name, "a.jsonl") == [name, "a.jsonl"]


def test_folders_globs_lists_and_home(here: Path):
    assert path_of("chats") == path_of("dataset=chats") == "chats"
    assert path_of("chats/*.jsonl") == path_of("dataset=chats/*.jsonl") == "chats/*.jsonl"
    assert path_of("chats/[12].jsonl") == path_of("dataset=chats/[12].jsonl") == "chats/[12].jsonl"
    assert path_of("~/at home.jsonl") == path_of("dataset=~/at home.jsonl") == "~/at home.jsonl"
    assert path_of("dataset=[a.jsonl,b.jsonl]") == path_of("b.jsonl", "a.jsonl")[::-1] == ["a.jsonl", "b.jsonl"]
    assert path_of('dataset=["a,b.jsonl",b.jsonl]') == ["a,b.jsonl", "b.jsonl"]
    assert path_of('dataset="my data.jsonl"') == path_of("dataset='my data.jsonl'") == "my data.jsonl"
    assert path_of("odd.dat") == "odd.dat"  # of a kind that is refused where data is read, with those that are known
    assert path_of("dataset=tatsu-lab/alpaca") == "tatsu-lab/alpaca"


def test_presets_stay_presets(here: Path):
    (here / "alpaca").mkdir()
    assert path_of("dataset=alpaca") == "tatsu-lab/alpaca"
    assert path_of("dataset=./alpaca") == "./alpaca"
    own = here / "own" / "dataset"
    (own / "team").mkdir(parents=True)
    (own / "mine.jsonl.yaml").write_text("path: of-the-preset\n")
    (own / "team" / "chats.yaml").write_text("path: of-the-team\n")
    assert path_of("dataset=mine.jsonl", config_dir=str(here / "own")) == "of-the-preset"
    assert path_of("dataset=team/chats", config_dir=str(here / "own")) == "of-the-team"
    assert path_of("dataset=team/chats") == "team/chats"  # without the folder, a Hub id
    for flags in (["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]):
        assert parse_overrides(["dataset=team/chats"], flags=flags)[0] == ["dataset=team/chats"]


def test_a_run_file_and_data(here: Path):
    """The command line stands over the file, whose other words on data stay."""
    (here / "run.yaml").write_text("dataset:\n  path: a.jsonl\n  limit: 3\ntrainer:\n  max_steps: 2\n")
    (here / "chosen.yaml").write_text("dataset: my data.jsonl\n")
    (here / "list.yaml").write_text("dataset: [a.jsonl, b.jsonl]\n")
    (here / "preset.yaml").write_text("dataset: alpaca_chat\n")
    for args in (["run.yaml", "b.jsonl"], ["b.jsonl", "run.yaml"], ["run.yaml", "dataset=b.jsonl"]):
        made = compose(args).tree
        assert made["dataset"]["path"] == "b.jsonl" and made["dataset"]["limit"] == 3
        assert made["trainer"]["max_steps"] == 2
    assert path_of("chosen.yaml") == "my data.jsonl" and path_of("chosen.yaml", "b.jsonl") == "b.jsonl"
    assert path_of("list.yaml") == ["a.jsonl", "b.jsonl"] and path_of("list.yaml", "dataset=alpaca") != "b.jsonl"
    made = compose(["preset.yaml", "b.jsonl"]).tree["dataset"]
    assert made["path"] == "b.jsonl" and "template" not in made
    assert path_of("recipe=llama3_1_8b_lora", "b.jsonl") == "b.jsonl"
    made = compose(["dataset=alpaca_chat", "dataset.path=b.jsonl"]).tree["dataset"]
    assert made["path"] == "b.jsonl" and "template" in made


def test_where_it_came_from(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "chosen.yaml").write_text("trainer: {max_steps: 2}\ndataset: a.jsonl\n")
    told = {
        ("a.jsonl", "model=gpt2"): "command line: dataset.path=a.jsonl",
        ("model=gpt2", "dataset=b.jsonl"): "command line: dataset.path=b.jsonl",
        ("chats", "model=gpt2"): 'command line: dataset.path="chats"',
        ("model=gpt2", "chosen.yaml"): "chosen.yaml:2",
    }
    for args, place in told.items():
        assert cli.run_verb(["why", "dataset.path", *args]) == DONE
        assert place in capsys.readouterr().out
    assert compose(["chosen.yaml"]).provenance["dataset.path"] == "chosen.yaml:2"


REFUSALS = {
    ("a.jsnol.gz",): ("is neither key=value, a YAML file nor data", ""),
    ("aa.jsonl", "model=gpt2"): ("there is no data file aa.jsonl", "did you mean a.jsonl"),
    ("dataset=bb.jsonl",): ("there is no data file bb.jsonl", "did you mean b.jsonl"),
    ("chats/3.jsonl",): ("there is no data file chats/3.jsonl", "where there is chats/1.jsonl, chats/2.jsonl"),
    ("nowhere/x.jsonl",): ("there is no data file nowhere/x.jsonl", "there is no folder nowhere"),
    ("chats/nothing",): ("there is no data file chats/nothing", "where there is chats/1.jsonl"),
    ("zzz*.jsonl",): ("no file matches zzz*.jsonl", "check the path"),
    ("dataset=chats/others",): ("there is no data file chats/others", "A Hub id: dataset.path=chats/others"),
    ("a.jsonl", "dataset=b.jsonl"): ("both a.jsonl and dataset=b.jsonl", "keep one"),
    ("a.jsonl", "dataset.path=b.jsonl"): ("both a.jsonl and dataset.path=b.jsonl", "keep one"),
    ("a.jsonl", "dataset=alpaca_chat"): ("both", "dataset=alpaca_chat dataset.path=a.jsonl"),
    ("dataset=a.jsonl,alpaca",): ("dataset= is given alpaca, a name, and a.jsonl, a file", "two sweeps"),
    ("dataset=[a.jsonl,gone.jsonl]",): ("there is no data file gone.jsonl", ""),
    ("dataset=alpca",): ("there is no dataset named 'alpca'", "did you mean dataset=alpaca"),
    ("owner/name",): ("neither key=value", "dataset=owner/name"),
    ("quickstart",): ("neither key=value", "recipe=quickstart"),
    ("some-run",): ("some-run is a run", "kit resume some-run"),
    ("list.yaml",): ("there is no data file gone.jsonl", ""),
    ("~nobody/x.jsonl",): ("", ""),
    ("x" * 5000 + ".jsonl",): ("there is no data file", "check the path"),
    ("a\0b.jsonl",): ("there is no data file", ""),
}


@pytest.mark.parametrize("args", REFUSALS, ids=lambda args: " ".join(args)[:50])
def test_what_is_refused_in_words(args: tuple[str, ...], here: Path):
    (here / "quickstart").mkdir()
    (here / "some-run").mkdir()
    (here / "some-run" / "plan.json").write_text("{}")
    (here / "list.yaml").write_text("dataset: [a.jsonl, gone.jsonl]\n")
    with pytest.raises(KitError) as refused:
        compose(list(args))
    problem, fix = REFUSALS[args]
    assert problem in refused.value.problems[0].problem and fix in refused.value.problems[0].fix


def test_misspelt_keys_are_still_keys(here: Path):
    """A word with an equals sign is a file only where that file is there."""
    overrides = ["lr=3", "dataset_path=x.jsonl", "dataset.eval_path=x.jsonl", "model.name_or_path=./x", "~peft"]
    assert parse_overrides(overrides)[0] == [o if o == "~peft" else f"++{o}" for o in overrides]


def test_without_a_model_the_refusal_names_it(here: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb(["train", "a.jsonl"]) == REFUSED
    said = capsys.readouterr().err
    assert "model.name_or_path is not given" in said and "model=NAME" in said and "dataset" not in said
    for verb in ("check", "fetch", "train"):
        assert cli.run_verb([verb, "gone.jsonl", "model=gpt2"]) == REFUSED
        assert "there is no data file gone.jsonl" in capsys.readouterr().err
    assert cli.run_verb(["compose", "gone.jsonl", "model=gpt2"]) == REFUSED
    assert "there is no data file gone.jsonl" in capsys.readouterr().out


def test_a_file_makes_a_plan(here: Path, base: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        cli.run_verb(["check", "my data.jsonl", f"model.name_or_path={base}", "trainer.max_length=64", "--json"]) == 0
    )
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (
        plan["dataset"]["path"] == str(here / "my data.jsonl")
        and '"my data.jsonl"' in plan["provenance"]["dataset.path"]
    )


def test_lists_and_globs_are_absolute_in_a_plan(here: Path):
    from kit.config.resolve import make_paths_absolute

    mix = [{"path": "a.jsonl"}, {"path": ["chats", "owner/name"]}]
    made = make_paths_absolute({"dataset": {"path": ["a.jsonl", "chats/*.jsonl"], "eval_path": None, "mix": mix}})
    assert made["dataset"]["path"] == [str(here / "a.jsonl"), str(here / "chats/*.jsonl")]
    assert made["dataset"]["mix"] == [{"path": str(here / "a.jsonl")}, {"path": [str(here / "chats"), "owner/name"]}]


def test_a_sweep_over_files(here: Path, monkeypatch: pytest.MonkeyPatch):
    """`-m dataset=a.jsonl,b.jsonl`: a run for each, under any name; a sweep over presets is Hydra's."""
    assert parse_overrides(["dataset=alpaca,capybara"])[0] == ["dataset=alpaca,capybara"]
    assert parse_overrides(["dataset=glob(al*)"])[0] == ["dataset=glob(al*)"]
    cases = {
        "dataset=a.jsonl,b.jsonl": ["a.jsonl", "b.jsonl"],
        'dataset=my data.jsonl,"a,b.jsonl",tatsu-lab/alpaca': ["my data.jsonl", "a,b.jsonl", "tatsu-lab/alpaca"],
        "dataset=a,b.jsonl": ["a,b.jsonl"],  # which is a file
    }
    for typed, paths in cases.items():
        from kit.config.multirun import MultirunJob, run_multirun

        seen: list = []

        def grid(points, seen=seen):
            assert not [p.problems for p in points if p.problems]
            seen += [p.composed.tree["dataset"]["path"] for p in points]
            return [(DONE, None)] * len(points)

        assert run_multirun(["-m", typed, "model=gpt2"], MultirunJob(None, grid, None)) == DONE  # type: ignore[arg-type]
        assert seen == paths
    with pytest.raises(KitError, match="dataset.path is given several values"):
        compose(["dataset=a.jsonl,b.jsonl"])


def test_any_text_is_quoted_for_the_grammar():
    draw = random.Random(0)
    texts = ["null", "true", "123", "1e5", "", " a", "a ", "\t", "choice(a,b).txt", *ODD_NAMES]
    texts += ["".join(draw.choices("ab\\\"'${}[]()=,: .?é", k=draw.randint(1, 9))) for _ in range(500)]
    parser = OverridesParser.create()
    for text in texts:
        value = parser.parse_overrides([f"k=[{hydra_text(text)}]"])[0].value()
        assert OmegaConf.to_container(OmegaConf.create({"k": value}), resolve=True) == {"k": [text]}, text
    assert split_at_commas('a b, "c,d" ,\'e,f\',g"h,,') == ["a b", "c,d", "e,f", 'g"h']
    assert composing.config_folders(["--config-dir=a", "-cd", "b", "-m"]) == [Path("b"), Path("a")]
