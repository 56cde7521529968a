"""kit import carries data: several sets, formats, roles, mixing, what is in the loss; nothing is lost unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, REFUSED, KitError
from kit.importing import Imported, import_config
from kit.schema.run_plan import Dataset

INFO = {
    "notes": {"file_name": "notes.json"},
    "hub": {"hf_hub_url": "owner/alpaca", "subset": "en", "split": "test", "num_samples": 50},
    "renamed": {"hf_hub_url": "owner/pairs", "columns": {"prompt": "q", "query": "c", "response": "a", "system": "s",
                                                         "history": "history"}},
    "chats": {"hf_hub_url": "owner/chats", "formatting": "sharegpt"},
    "openai": {"hf_hub_url": "owner/openai", "formatting": "sharegpt",
               "columns": {"messages": "dialog", "tools": "fns"},
               "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                        "assistant_tag": "bot"}},
    "odd": {"hf_hub_url": "owner/odd", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}},
    "text": {"hf_hub_url": "owner/text", "columns": {"prompt": "body"}},
    "pairs": {"hf_hub_url": "owner/dpo", "ranking": True, "columns": {"chosen": "c", "rejected": "r"}},
    "kto": {"hf_hub_url": "owner/kto", "formatting": "sharegpt", "columns": {"messages": "m", "kto_tag": "label"}},
    "images": {"hf_hub_url": "owner/vl", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "scripted": {"script_url": "load.py"},
    "elsewhere": {"ms_hub_url": "owner/there"},
}  # fmt: skip
AX = "base_model: gpt2\nlearning_rate: 1e-4\n"
LF = "model_name_or_path: gpt2\nstage: sft\n"
TRL = "model_name_or_path: gpt2\n"
# A config, what it makes of the dataset section (their defaults too), and words of what is not carried.
CARRIED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "axolotl mix": (
        AX + """
datasets:
  - {path: owner/chats, type: chat_template, field_messages: conversations, split: "train[:500]",
     message_property_mappings: {role: from, content: value}, roles: {user: [human, asker], assistant: [gpt]},
     roles_to_train: [gpt], train_on_eos: turn}
  - {path: json, data_files: [a.jsonl, b.jsonl], ds_type: json, type: chat_template, field_tools: functions}
  - {path: owner/pairs, name: en, revision: abc, type: alpaca, split: "train[:10%]"}
  - {path: owner/text, type: completion, field: body}
excess_length_strategy: truncate
train_on_inputs: false
""",
        {"mix": [
            {"path": "owner/chats", "split": "train", "limit": 500, "format": "sharegpt",
             "columns": {"messages": "conversations"}, "roles": {"asker": "user"}},
            {"path": ["a.jsonl", "b.jsonl"], "format": "messages", "columns": {"tools": "functions"}},
            {"path": "owner/pairs", "name": "en", "revision": "abc", "split": "train[:10%]",
             "format": "alpaca_prompt"},
            {"path": "owner/text", "format": "text", "columns": {"text": "body"}},
        ], "train_on": "assistant_turns", "on_long_row": "truncate"},
        [],
    ),
    "axolotl everything": (
        AX + "train_on_inputs: true\ndatasets: [{path: owner/a, type: sharegpt}, {path: owner/b, type: alpaca}]",
        {"mix": [{"path": "owner/a", "format": "sharegpt"}, {"path": "owner/b", "format": "alpaca_prompt"}],
         "train_on": "everything", "on_long_row": "drop"},
        [],
    ),
    "axolotl last turn": (
        AX + "datasets: [{path: owner/a, type: chat_template, roles_to_train: [], train_on_eos: null}]",
        {"path": "owner/a", "format": "messages", "train_on": "last_turn", "on_long_row": "drop"},
        [],
    ),
    "axolotl chosen turns": (
        AX + "datasets: [{path: owner/a, type: chat_template, roles_to_train: [], message_field_training: train}]",
        {"path": "owner/a", "format": "messages", "train_on": "chosen_turns", "on_long_row": "drop"},
        [],
    ),
    "axolotl masks that cannot be said": (
        AX + "datasets: [{path: owner/a, type: chat_template, roles_to_train: [user, assistant], train_on_eos: all,\n"
        "  message_field_training: learn, drop_system_message: true, shards: 4}]",
        {"path": "owner/a", "format": "messages", "train_on": "assistant_turns", "on_long_row": "drop"},
        ["datasets[0].roles_to_train", "datasets[0].train_on_eos", "datasets[0].message_field_training",
         "datasets[0].drop_system_message", "datasets[0].shards"],
    ),
    "axolotl lost sets": (
        AX + "datasets:\n- {path: owner/a, type: completion}\n- {path: owner/b, type: jeopardy}\n"
        "- {path: s3://bucket/c, type: alpaca}\n- {path: owner/d, data_files: x.jsonl, type: alpaca}\n"
        "- {type: alpaca}\n"
        "- {path: owner/e, type: input_output}\n- {path: owner/f, type: null, field_messages: m}",
        {"path": "owner/a", "format": "text", "on_long_row": "split"},
        [f"datasets[{n}]" for n in range(1, 7)],
    ),
    "axolotl tokenized and own": (
        AX + "datasets:\n- {path: owner/a, type: }\n- path: owner/b\n  type: {field_output: out, format: 'Q {input}'}",
        {"mix": [{"path": "owner/a", "format": "tokenized"},
                 {"path": "owner/b", "template": {"prompt": "Q {input}", "completion": "{out}"}}],
         "on_long_row": "drop"},
        [],
    ),
    "axolotl evaluation": (
        AX + "datasets: [{path: owner/a, type: alpaca}]\ntest_datasets: [{path: owner/a, type: alpaca, split: test}]",
        {"path": "owner/a", "format": "alpaca_prompt", "eval_split": "test", "on_long_row": "drop"},
        [],
    ),
    "llamafactory concat": (
        LF + "dataset: hub,chats,openai\nmax_samples: 100\nmix_strategy: concat\nmask_history: true",
        {"mix": [
            {"path": "owner/alpaca", "name": "en", "split": "test", "format": "alpaca", "limit": 50},
            {"path": "owner/chats", "format": "sharegpt", "limit": 100},
            {"path": "owner/openai", "format": "messages", "columns": {"messages": "dialog", "tools": "fns"},
             "roles": {"bot": "assistant"}, "limit": 100},
        ], "train_on": "last_turn"},
        [],
    ),
    "llamafactory interleave": (
        LF + "dataset: [renamed, text]\nmix_strategy: interleave_over\ninterleave_probs: 0.7,0.3\n"
        "train_on_prompt: true",
        {"mix": [
            {"path": "owner/pairs", "format": "alpaca", "weight": 0.7,
             "columns": {"instruction": "q", "input": "c", "output": "a", "system": "s"}},
            {"path": "owner/text", "format": "text", "columns": {"text": "body"}, "weight": 0.3},
        ], "mix_until": "all_exhausted", "train_on": "everything"},
        [],
    ),
    "llamafactory under, without shares": (
        LF + "dataset: hub, chats\nmix_strategy: interleave_under",
        {"mix": [
            {"path": "owner/alpaca", "name": "en", "split": "test", "limit": 50, "format": "alpaca", "weight": 1.0},
            {"path": "owner/chats", "format": "sharegpt", "weight": 1.0},
        ], "mix_until": "first_exhausted", "train_on": "assistant_turns"},
        [],
    ),
    "llamafactory lost sets": (
        LF + "dataset: chats,scripted,elsewhere,unknown,odd\neval_dataset: hub",
        {"mix": [{"path": "owner/chats", "format": "sharegpt"}, {"path": "owner/odd", "format": "sharegpt"}],
         "eval_path": "owner/alpaca", "train_on": "assistant_turns"},
        ["note: NOT carried: scripted is a script", "note: NOT carried: elsewhere lies on ModelScope alone",
         "note: NOT carried: unknown is a name in a dataset_info.json", "note: NOT carried: turns that write speaker"],
    ),
    "llamafactory online": (
        LF + "dataset: owner/a,owner/b\ndataset_dir: ONLINE",
        {"mix": [{"path": "owner/a", "format": "alpaca"}, {"path": "owner/b", "format": "alpaca"}],
         "train_on": "assistant_turns"},
        [],
    ),
    "trl fractions": (
        TRL + "datasets:\n- {path: owner/a, name: en, fraction: 0.7, columns: [messages]}\n"
        "- {path: json, data_files: {train: a.jsonl}, fraction: 0.3}\n- {name: nothing}",
        {"mix": [{"path": "owner/a", "name": "en", "weight": 0.7}, {"path": "a.jsonl", "weight": 0.3}]},
        ["datasets[2]"],
    ),
    "handbook mixture": (
        TRL + """
dataset_mixture:
  datasets:
    - {id: owner/a, config: default, split: train_sft, columns: [messages], weight: 1.0}
    - {id: owner/b, split: train_sft, columns: [messages], weight: 0.5}
    - {id: owner/c, columns: [messages], weight: 0.001}
  test_split_size: 1000
  seed: 3
chat_template: "{% for m in messages %}{{ m }}{% endfor %}"
eval_strategy: epoch
""",
        {"mix": [{"path": "owner/a", "name": "default", "split": "train_sft"},
                 {"path": "owner/b", "split": "train_sft[:50%]"}], "test_size": 1000, "seed": 3},
        ["dataset_mixture.datasets[2]", "chat_template"],
    ),
    "handbook mixer": (
        TRL + "dataset_mixer: {owner/a: 1.0, owner/b: 0.25}\ndataset_splits: [train_sft, test_sft]\n"
        "eval_strategy: epoch",
        {"mix": [{"path": "owner/a", "split": "train_sft"}, {"path": "owner/b", "split": "train_sft[:25%]"}]},
        ["dataset_splits"],
    ),
    "handbook mixer of one": (
        TRL + "dataset_mixer: {owner/a: 1.0}\ndataset_splits: [train_sft, test_sft]\neval_strategy: epoch\n"
        "chat_template: chatml",
        {"path": "owner/a", "split": "train_sft", "eval_split": "test_sft"},
        [],
    ),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    return tmp_path


def make(text: str, check: bool = False) -> Imported:
    Path("config.yaml").write_text(text, encoding="utf-8")
    return import_config("config.yaml", check=check)


@pytest.mark.parametrize("name", CARRIED)
def test_data_is_carried(name: str, here: Path):
    """The section as expected, of values that the schema takes; what is missing is said, in the recipe's text too."""
    text, expected, lost = CARRIED[name]
    made = make(text)
    assert made.tree["dataset"] == expected
    Dataset.model_validate(made.tree["dataset"])
    left = {e.key for e in made.entries if e.outcome == "left"}
    assert {word for word in lost if not word.startswith("note: ")} == left
    for word in lost:
        assert word.removeprefix("note: ") in made.text
    for note in [word for word in lost if word.startswith("note: ")]:
        assert any(n.startswith(note.removeprefix("note: ")) for n in made.notes), made.notes


@pytest.mark.parametrize("name", CARRIED)
def test_the_data_composes(name: str, here: Path):
    """Every key that is written stands up to kit check, on data that is not here."""
    made = make(CARRIED[name][0])
    Path("made.yaml").write_text(made.text, encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "functions": []}
    for file in ("a.jsonl", "b.jsonl"):
        Path(file).write_text(json.dumps(chat) + "\n", encoding="utf-8")
    more = ["dataset.test_size=0.05"] if "dataset_splits" in CARRIED[name][2] else []  # as the report advises
    plan = api.compose("made.yaml", "trainer.use_cpu=false", *more)
    assert len(plan.dataset.mix) == len(made.tree["dataset"].get("mix", []))
    assert bool(plan.dataset.path) != bool(plan.dataset.mix)


REFUSED_RUNS = {
    LF + "dataset: chats,pairs": "pairs holds preferences",
    LF + "dataset: kto": "kto holds preferences",
    LF + "dataset: chats,images": "images holds images",
    LF + "dataset: nowhere\nimage_max_pixels: 262144": "image_max_pixels is given",
    LF + "dataset: chats\nmask_history: true\ntrain_on_prompt: true": "exclude each other",
    LF.replace("sft", "dpo") + "dataset: pairs": "no supervised fine-tuning|not a supervised",
    "model: Qwen/Qwen3-4B\nmodel_class: llm\ntrain_dataset: data/x.yaml\ncutoff_len: 2048": "LLaMA-Factory v1",
    AX + "rl: dpo\ndatasets: [{path: owner/a, type: chatml.intel}]": "rl: dpo",
    AX + "processor_type: AutoProcessor\ndatasets: [{path: owner/a, type: chat_template}]": "images or sound",
    TRL + "beta: 0.01\ndataset_name: owner/a": "beta belongs to another trainer",
    TRL + "loss_type: sigmoid\ndataset_name: owner/a": "loss_type sigmoid",
    TRL + "num_generations: 8\ndataset_name: owner/a": "num_generations belongs",
    TRL + "dataset_mixture: {datasets: [{id: owner/a, columns: [chosen, rejected]}]}": "preferences",
}


@pytest.mark.parametrize("text", REFUSED_RUNS)
def test_runs_that_are_no_text_sft(text: str, here: Path):
    with pytest.raises(KitError, match=REFUSED_RUNS[text]):
        make(text)


def test_scripts_of_other_methods(here: Path, capsys: pytest.CaptureFixture[str]):
    for script in ("dpo.py", "orpo.py", "run_kto.py", "scripts/grpo.py", "reward_modeling.py", "sft_vlm.py"):
        assert cli.run_verb(["import", "python", script, "--model_name_or_path", "gpt2"]) == REFUSED
        assert "is no supervised fine-tuning of text" in capsys.readouterr().err
    Path("run.yaml").write_text(LF + "dataset: chats\n")
    assert cli.run_verb(["import", "llamafactory-cli train run.yaml"]) == DONE  # one word, as it is pasted
    assert "path: owner/chats" in capsys.readouterr().out


def test_nothing_is_said_of_an_evaluation_that_is_none(here: Path):
    """As Axolotl's own examples have it, and beside rows that are held out."""
    data = "datasets: [{path: owner/text, type: completion}]\nsequence_len: 512\nsample_packing: true\n"
    for sampled in ("true", "false"):
        text = AX + data + f"eval_sample_packing: {sampled}\nval_set_size: "
        without, held_out = make(text + "0.0\n", check=True), make(text + "0.1\n", check=True)
        assert "eval_packing" not in str(without.tree) and not without.problems
        assert "eval_packing" in str(held_out.tree)


def test_the_switches_of_peft(here: Path):
    """PEFT's example script has its own words for an adapter and for 4 bits: never full fine-tuning in silence."""
    made = make(TRL + "use_peft_lora: true\nuse_4bit_quantization: true\nuse_nested_quant: true\n"
                "lora_target_modules: q_proj,v_proj\nlora_r: 8\ndataset_name: owner/a")  # fmt: skip
    assert made.tree["defaults"] == [{"override /quantization": "nf4"}]
    assert made.tree["peft"]["target_modules"] == ["q_proj", "v_proj"] and made.tree["peft"]["lora_dropout"] == 0.1
    assert not [e for e in made.entries if e.outcome == "left"]
    full = make(TRL + "use_peft_lora: false\nuse_8bit_quantization: false\ndataset_name: owner/a")
    assert full.tree["defaults"] == [{"override /peft": "none"}]


def test_files_that_are_here(here: Path):
    """Files of a folder, and those of a dataset_info.json, under their paths."""
    Path("rows").mkdir()
    made = make(AX + "datasets: [{path: rows, data_files: [a.jsonl, b.jsonl], type: alpaca}]").tree["dataset"]
    assert made["path"] == ["rows/a.jsonl", "rows/b.jsonl"]
    assert make(LF + "dataset: notes").tree["dataset"]["path"] == "notes.json"
    made = make(AX + "datasets: [{ds_type: json, data_files: [a.jsonl], type: alpaca, split: train}]").tree["dataset"]
    assert made["path"] == "a.jsonl" and made["split"] == "train"


def test_the_report_names_every_set(here: Path, capsys: pytest.CaptureFixture[str]):
    text, _, _ = CARRIED["axolotl lost sets"]
    Path("config.yaml").write_text(text, encoding="utf-8")
    assert cli.run_verb(["import", "config.yaml", "--out", "made.yaml"]) == DONE
    shown = capsys.readouterr().out
    for said in ("type jeopardy", "s3://bucket/c", "single files of owner/d", "names neither", "type input_output"):
        assert f"NOT carried: {said}" in shown or said in shown
    made = yaml.safe_load(Path("made.yaml").read_text())
    assert made["dataset"]["path"] == "owner/a"


ODD = [[], {}, 1, True, None, "x", [1], {"a": 1}, 1.5, [[1]], [{"a": [2]}]]


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in pairs for place in [(*at, key), *places(value, (*at, key))]]


@pytest.mark.parametrize("name", CARRIED)
def test_a_value_of_any_kind_is_read_or_refused_in_words(name: str, here: Path):
    """Each key with values of another kind: no traceback."""
    tree = yaml.safe_load(CARRIED[name][0])
    heads = ("dataset", "test_", "train_", "m", "interl", "eval")
    for place in [p for p in places(tree) if str(p[0]).startswith(heads)]:
        for value in ODD:
            copy = json.loads(json.dumps(tree))
            inner = copy
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                make(yaml.safe_dump(copy))
            except KitError as error:
                assert all(p.problem for p in error.problems), (place, value)
