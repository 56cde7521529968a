"""kit import: every source key ends in one place, recipes compose, what is not carried is named, no code runs."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE, REFUSED, KitError
from kit.foreign.tree import iterate_leaves
from kit.importing import Imported, import_config
from kit.schema import fields
from kit.schema.run_plan import leaves as flat

EXAMPLES = Path(__file__).parent / "importing"
ROWS = {
    "data/mine.jsonl": {"prompt": "a", "completion": "b"},
    "data/other.jsonl": {"prompt": "a", "completion": "b"},
    "data/chats.jsonl": {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    "data/notes.jsonl": {"note": "a"},
    "chats.jsonl": {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
    "notes.json": {"instruction": "a", "input": "", "output": "b"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples and the data that they name."""
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    for name, row in ROWS.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def values(made: Imported) -> dict:
    """Dotted kit key to value, and group to choice."""
    tree = dict(made.tree)
    chosen = {k.removeprefix("override /"): v for d in tree.pop("defaults", []) for k, v in d.items()}
    return {**flat(tree), **chosen}


def whole(made: Imported) -> dict:
    return {**{k: made.tree[k] for k in made.tree if k != "defaults"}, **values(made)}


def outcome(made: Imported, key: str) -> str:
    found = [e.outcome for e in made.entries if e.key == key]
    assert len(found) == 1, (key, found)
    return found[0]


# What is imported -> kit keys and groups of the recipe, and source keys that are not carried over.
TABLE: dict[str, tuple[dict, list[str]]] = {
    "trl_lora.yaml": (
        {
            "model.name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "model.dtype": "bfloat16", "tracking": "wandb",
            "model.attn_implementation": "sdpa", "dataset.path": "trl-lib/Capybara", "dataset.eval_split": "test",
            "peft.r": 32, "peft.lora_alpha": 64, "peft.lora_dropout": 0.05, "trainer.learning_rate": 2e-4,
            "peft.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "trainer.warmup_steps": 0.05,
            "trainer.max_length": 2048, "trainer.packing": True, "trainer.eval_strategy": "steps",
            "trainer.lr_scheduler_type": "linear", "trainer.seed": 7, "trainer.save_total_limit": None,
        },
        ["hub_token", "output_dir"],
    ),
    "trl_full.json": (
        {
            "peft": "none", "model.dtype": "float32", "dataset.columns.text": "quote", "trainer.learning_rate": 5e-5,
            "trainer.train_sampling_strategy": "group_by_length", "trainer.save_strategy": "no",
            "trainer.gradient_checkpointing": False, "trainer.num_train_epochs": 3.0, "trainer.max_steps": 300,
        },
        ["output_dir"],
    ),
    "trl_qlora.yaml": (
        {
            "quantization": "nf4", "quantization.bnb_4bit_use_double_quant": True,
            "dataset.mix": [{"path": "data/mine.jsonl", "split": "train"}, {"path": "data/other.jsonl"}],
            "dataset.test_size": 0.05, "trainer.eval_strategy": "no", "peft.target_modules": "all-linear",
            "trainer.optim": "paged_adamw_8bit", "trainer.max_grad_norm": 0.3,
        },
        ["trust_remote_code", "frobnicate"],
    ),
    "accelerate_zero2.yaml": (
        {
            "deepspeed.zero_optimization.stage": 2, "deepspeed.zero_optimization.offload_optimizer.device": "cpu",
            "deepspeed.bf16.enabled": "auto", "trainer.gradient_accumulation_steps": 8, "trainer.max_grad_norm": 0.5,
            "trainer.bf16": True, "trainer.fp16": False, "launch.num_gpus": 4,
        },
        [],
    ),
    "accelerate_file.yaml": (
        {"deepspeed.file": "my_zero3.json", "launch.num_gpus": 8, "launch.master_port": 29511, "trainer.bf16": True},
        [],
    ),
    "accelerate_fsdp.yaml": (
        {
            "fsdp.version": 2, "fsdp.cpu_offload": False, "fsdp.reshard_after_forward": True, "trainer.bf16": False,
            "trainer.torch_compile": True, "trainer.torch_compile_backend": "inductor", "launch.num_gpus": 2,
        },
        [],
    ),
    "axolotl_qlora.yaml": (
        {
            "quantization": "nf4", "tracking": "wandb", "peft.target_modules": "all-linear", "peft.r": 16,
            "trainer.per_device_train_batch_size": 2, "trainer.max_length": 4096, "trainer.packing": True,
            "dataset.test_size": 0.1, "trainer.warmup_steps": 0.1, "deepspeed.file": "my_zero3.json",
            "trainer.eval_steps": 0.125, "trainer.save_steps": 0.5, "trainer.bf16": "auto",
            "tokenizer.pad_token": "<unk>",
            "dataset.format": "alpaca_prompt", "dataset.on_long_row": "drop", "trainer.optim": "adamw_bnb_8bit",
            "trainer.average_tokens_across_devices": False, "trainer.save_total_limit": 4,
        },
        ["output_dir", "wandb_project"],
    ),
    "axolotl_chat.yaml": (
        {
            "dataset.path": "data/chats.jsonl", "dataset.columns.messages": "conversations",
            "dataset.format": "sharegpt", "dataset.train_on": "assistant_turns",
            "tokenizer.added_tokens": ["<tool>"], "trainer.warmup_steps": 20,
            "peft.modules_to_save": ["embed_tokens", "lm_head"], "trainer.use_liger_kernel": True,
            "trainer.gradient_checkpointing": False, "trainer.save_strategy": "epoch",
        },
        ["plugins", "early_stopping_patience"],
    ),
    "axolotl_full.yaml": (
        {
            "peft": "none", "dataset.path": "data/notes.jsonl", "dataset.columns.text": "note", "fsdp.version": 2,
            "fsdp.cpu_offload": True, "fsdp.reshard_after_forward": True, "trainer.gradient_accumulation_steps": 4,
            "trainer.warmup_steps": 0.03, "tokenizer.pad_token": "<|pad|>", "trainer.learning_rate": 1e-5,
        },
        [],
    ),
    "llamafactory_lora.yaml": (
        {
            "dataset.path": "notes.json", "dataset.format": "alpaca", "peft.r": 16,
            "dataset.train_on": "assistant_turns", "dataset.limit": 1000, "dataset.test_size": 0.1,
            "trainer.max_length": 1024, "trainer.warmup_steps": 0.1, "peft.target_modules": "all-linear",
            "trainer.dataset_num_proc": 4,
        },
        ["trust_remote_code", "template", "output_dir"],
    ),
    "llamafactory_qlora.yaml": (
        {
            "quantization": "nf4", "quantization.bnb_4bit_use_double_quant": False, "peft.lora_alpha": 16,
            "peft.target_modules": ["q_proj", "v_proj"], "peft.modules_to_save": ["embed_tokens", "lm_head"],
            "peft.use_dora": True, "tokenizer.chat_template": "chatml", "trainer.packing": True,
            "tracking": "tensorboard",
            "model.attn_implementation": "flash_attention_2", "trainer.gradient_checkpointing": False,
            "dataset.mix": [{"path": "chats.jsonl", "format": "sharegpt", "columns": {"messages": "conversations"}},
                            {"path": "notes.json", "format": "alpaca"}],
            "trainer.logging_steps": 500, "trainer.fp16": True,
        },
        ["swanlab_api_key"],
    ),
    "llamafactory_full.yaml": (
        {"peft": "none", "deepspeed.file": "my_zero3.json", "trainer.max_length": 2048, "trainer.logging_steps": 500},
        ["dataset", "template"],
    ),
    "trl sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara --use_peft --load_in_8bit "
    "--lora_target_modules q_proj v_proj --learning_rate 2e-4 --eval_strategy no --bf16 true --lora-r 4": (
        {
            "quantization": "int8", "peft.target_modules": ["q_proj", "v_proj"], "peft.r": 4,
            "trainer.learning_rate": 2e-4, "trainer.eval_strategy": "no", "trainer.bf16": True,
            "model.dtype": "float32",
        },
        [],
    ),
    "WANDB_API_KEY=0123 accelerate launch --config_file accelerate_zero2.yaml --num_processes=2 sft.py "
    "--config trl_lora.yaml --learning_rate 3e-5 --gradient_accumulation_steps 2": (
        {
            "launch.num_gpus": 2, "trainer.learning_rate": 3e-5, "trainer.gradient_accumulation_steps": 2,
            "deepspeed.zero_optimization.stage": 2, "peft.r": 32,
        },
        ["WANDB_API_KEY", "deepspeed_config.gradient_accumulation_steps", "hub_token", "output_dir"],
    ),
    "llamafactory-cli train llamafactory_lora.yaml learning_rate=3e-5 lora_rank=4": (
        {"trainer.learning_rate": 3e-5, "peft.r": 4, "peft.lora_alpha": 8},
        ["trust_remote_code", "template", "output_dir"],
    ),
    "axolotl train axolotl_chat.yaml --micro-batch-size 1 --deepspeed my_zero3.json": (
        {"trainer.per_device_train_batch_size": 1, "deepspeed.file": "my_zero3.json"},
        ["plugins", "early_stopping_patience"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TABLE)
def test_keys_of_the_recipe(what: str, here: Path):
    expected, left = TABLE[what]
    made = import_config(*(shlex.split(what) if " " in what else [what]), check=False)
    found = whole(made)
    assert {k: found.get(k, "MISSING") for k in expected} == expected
    again = [e.key for e in made.entries if e.note.startswith("given again")]
    assert sorted(e.key for e in made.entries if e.outcome == "left") == sorted([*left, *again])


@pytest.mark.parametrize("what", TABLE)
def test_the_recipe_composes_to_a_plan(what: str, here: Path):
    """The recipes of the table stand up to kit check; a part of a run is checked with somebody's model and data."""
    made = import_config(*(shlex.split(what) if " " in what else [what]))
    assert [p.problem for p in made.problems] == REFUSALS.get(what.split(" ")[0], [])
    file = here / "made.yaml"
    file.write_text(made.text, encoding="utf-8")
    if made.problems or "model" not in made.tree:
        return
    plan = api.compose(str(file), "trainer.use_cpu=false")
    for key, value in values(made).items():
        if key.startswith("trainer.") and value not in ("auto", None) and not key.count(".") > 1:
            assert plan.trainer[key.removeprefix("trainer.")] == value, key


REFUSALS: dict[str, list[str]] = {
    "llamafactory_full.yaml": ["dataset.path is not given"],
}


@pytest.mark.parametrize("what", [w for w in TABLE if " " not in w])
def test_every_source_key_ends_once(what: str, here: Path):
    every_key_once(import_config(what, check=False), yaml.safe_load((here / what).read_text()))


def every_key_once(made: Imported, tree: dict) -> None:
    """Each leaf of the source is covered by one entry, its own or that of a block around it."""
    from kit.foreign.tree import dotted_key

    counts = Counter(e.key for e in made.entries)
    assert {k: n for k, n in counts.items() if n > 1} == {}
    names = set(counts)
    hidden = {
        e.key for e in made.entries if e.note in ("a secret is never copied", "no config names code to run here")
    }
    for path, _ in iterate_leaves(tree, "the source"):
        covers = [dotted_key(path[:n]) for n in range(1, len(path) + 1) if dotted_key(path[:n]) in names]
        if len(covers) == 2 and covers[1] in hidden:  # the block is carried without it
            del covers[0]
        assert len(covers) == 1, (path, covers)
    for entry in made.entries:
        assert entry.outcome in ("carried", "default", "left")
        assert bool(entry.to) == (entry.outcome == "carried"), entry
        assert entry.note or entry.outcome == "carried", entry


WORD = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=5,
)
KEPT = {name: yaml.safe_load((EXAMPLES / name).read_text()) for name in TABLE if " " not in name}
STRANGE = st.dictionaries(WORD.map(lambda w: f"zz_{w}"), VALUE, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(KEPT)), extra=STRANGE, dropped=st.data())
def test_strange_keys_are_named_and_every_key_ends_once(name: str, extra: dict, dropped, tmp_path_factory):
    """Some keys taken out, strange ones put in: each strange one is reported as not carried, none is lost."""
    gone = dropped.draw(st.sets(st.sampled_from(sorted(KEPT[name])), max_size=3)) - {"base_model", "stage"}
    gone -= {"distributed_type", "compute_environment"}
    tree = {**{k: v for k, v in KEPT[name].items() if k not in gone}, **extra}
    file = tmp_path_factory.mktemp("strange") / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    made = import_config(str(file), check=False)
    left = {e.key for e in made.entries if e.outcome == "left"}
    for key in extra:
        assert any(k == key or k.startswith((f"{key}.", f"{key}[")) for k in left), key
    every_key_once(made, tree)
    assert isinstance(yaml.safe_load(made.text), dict)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(KEPT)), changes=st.data())
def test_any_value_under_a_known_key_is_read_or_refused_in_words(name: str, changes, tmp_path_factory):
    tree = dict(KEPT[name])
    for key in changes.draw(st.sets(st.sampled_from(sorted(tree)), min_size=1, max_size=3)):
        tree[key] = changes.draw(VALUE)
    file = tmp_path_factory.mktemp("changed") / "config.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        made = import_config(str(file), check=False)
    except KitError as error:
        assert error.problems and all(p.problem for p in error.problems)
        return
    every_key_once(made, tree)


ODD = [[], {}, 1, True, None, "x", [1], {"a": 1}, 1.5]


def keys_of(tree: dict, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    inner = [path for key, value in tree.items() if isinstance(value, dict) for path in keys_of(value, (*at, key))]
    return [(*at, key) for key in tree] + inner


@pytest.mark.parametrize("name", KEPT)
def test_every_key_with_a_value_of_another_kind(name: str, tmp_path: Path):
    file = tmp_path / "config.yaml"
    for path, value in itertools.product(keys_of(KEPT[name]), ODD):
        tree = copy.deepcopy(KEPT[name])
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            import_config(str(file), check=False)
        except KitError as error:
            assert error.problems and all(p.problem for p in error.problems), (path, value)


ROUND = ["gpt2_lora_quotes", "llama3_1_8b_lora", "mistral_7b_dora", "phi4_lora_zero2", "llama3_1_8b_full_zero3"]


@pytest.mark.parametrize("recipe", ROUND)
def test_a_plan_written_as_trl_arguments_comes_back(recipe: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = api.compose(f"recipe={recipe}", "trainer.use_cpu=false")
    known = set(fields.field_names("SFTConfig"))
    tree = {k: v for k, v in plan.trainer.items() if k in known}
    tree |= {"model_name_or_path": plan.model.name_or_path, "dtype": plan.model.dtype, "use_peft": bool(plan.peft)}
    if plan.peft:
        tree |= {f"lora_{k}": plan.peft[k] for k in ("r", "target_modules")}
        tree |= {k: plan.peft[k] for k in ("lora_alpha", "lora_dropout")}
        tree |= {"use_dora": bool(plan.peft.get("use_dora")), "lora_modules_to_save": plan.peft.get("modules_to_save")}
    Path("args.yaml").write_text(yaml.safe_dump({**tree, "dataset_name": "trl-lib/Capybara"}), encoding="utf-8")
    made = import_config("args.yaml", check=False)
    Path("back.yaml").write_text(made.text, encoding="utf-8")
    more = [f"tokenizer.pad_token={json.dumps(plan.tokenizer.pad_token)}"] if plan.tokenizer.pad_token else []
    back = api.compose("back.yaml", "dataset.test_size=0.1", *more)
    assert {k: back.trainer.get(k) for k in tree if k in known} == {k: v for k, v in tree.items() if k in known}
    assert (back.model.name_or_path, back.model.dtype) == (plan.model.name_or_path, plan.model.dtype)
    for key in ("r", "target_modules", "lora_alpha", "lora_dropout", "use_dora", "modules_to_save"):
        assert (back.peft or {}).get(key) == ((plan.peft or {}).get(key) or (back.peft or {}).get(key)), key


def test_several_files_that_belong_together(here: Path):
    """The accelerate config's JSON is followed; the run's own file says what stands."""
    made = import_config("trl_full.json", "accelerate_file.yaml", "my_zero3.json", check=False)
    found = values(made)
    assert found["deepspeed.file"] == "my_zero3.json" and found["launch.num_gpus"] == 8
    assert found["trainer.fp16"] is False and found["trainer.bf16"] is True
    assert dict(made.detected) == {
        "trl_full.json": "trl", "accelerate_file.yaml": "accelerate", "my_zero3.json": "deepspeed",
    }  # fmt: skip
    assert import_config("trl_full.json", "accelerate_file.yaml").problems == []


def test_two_sources_that_disagree(tmp_path: Path):
    one, two = tmp_path / "acc.yaml", tmp_path / "trl.yaml"
    one.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp16\n")
    two.write_text("model_name_or_path: gpt2\nbf16: true\nfp16: false\n")
    made = import_config(str(two), str(one), check=False)
    assert values(made)["trainer.bf16"] is True and values(made)["trainer.fp16"] is False
    entry = next(e for e in made.entries if e.key == "mixed_precision")
    assert entry.outcome == "left" and "stands" in entry.note


BROKEN = {
    "empty": (b"", "is empty"),
    "blank": (b"  \n\n", "is empty"),
    "comment": (b"# nothing\n", "holds nothing"),
    "list": (b"- base_model: x\n", "holds a list"),
    "text": (b"just words\n", "holds text"),
    "broken": (b"base_model: x\n  lora_r: [1, 2\n", "not valid YAML"),
    "tab": (b"base_model: x\n\tlora_r: 8\n", "not valid YAML"),
    "binary": (b"\x00\x01\x02base_model: x", "is not text"),
    "latin": ("base_model: \xe9".encode("latin-1"), "is not UTF-8"),
    "twice": (b"base_model: x\nlora_r: 8\nlora_r: 16\n", "given twice"),
    "object": (b"base_model: !!python/object/apply:os.system ['touch ran']\n", "makes objects"),
    "name": (b"base_model: x\nhook: !!python/name:os.system\n", "makes objects"),
    "own tag": (b"base_model: !Model x\n", "makes objects"),
    "itself": (b"base_model: x\na: &a [*a]\n", ""),
    "deep": (b"base_model: x\na: " + b"[" * 3000 + b"]" * 3000, ""),
    "aliases": (b"base_model: x\na: &a {k: 1, l: 2, m: 3, n: 4, o: 5, p: 6, q: 7, r: 8}\n" + b"".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{{', '.join(f'k{j}: *{chr(97 + i)}' for j in range(8))}}}\n".encode()
        for i in range(8)), "more than"),
    "merges": (b"base_model: x\na: &a {k: 1}\n" + b"".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join(['*' + chr(97 + i)] * 9)}]}}\n".encode()
        for i in range(9)), "merge keys"),
    "stranger": (b"colour: red\n", "has no key of"),
    "ours": (b"trainer: {max_steps: 1}\nmodel: {name_or_path: x}\n", "kit's own form"),
    "dpo": (b"stage: dpo\nmodel_name_or_path: x\n", "not a supervised fine-tuning run"),
    "rl": (b"base_model: x\nrl: dpo\n", "no supervised fine-tuning run"),
    "freeze": (b"stage: sft\nfinetuning_type: freeze\n", "not known here"),
    "parked": (b"train_type: qlora\nmodel_name: x\n", "has no key of"),
    "sagemaker": (b"compute_environment: AMAZON_SAGEMAKER\n", "no machine"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_are_refused_in_words(case: str, tmp_path: Path, monkeypatch, capsys):
    content, said = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_bytes(content)
    assert cli.run_verb(["import", "config.yaml"]) == REFUSED
    shown = capsys.readouterr()
    assert said in shown.err and "config.yaml" in shown.err and not shown.out
    assert not Path("ran").exists()


COMMANDS = {
    "trl dpo --model_name_or_path x": "no supervised fine-tuning run",
    "llamafactory-cli export x.yaml": "does not train",
    "axolotl merge-lora x.yaml": "does not train",
    "no-such.yaml": "there is no file",
    "hello": "neither a file",
    "python train.py --model_name x --train_type hqq_dora": "train_type = hqq_dora is not carried",
    "/dev/zero": "no plain file",
    "axolotl.yaml trl.yaml": "describe two runs",
    ".": "is a folder",
    "--from nobody axolotl.yaml": "there is no format",
    "axolotl.yaml --out": "needs a value",
    "axolotl.yaml --out notes.txt": "is no name for a recipe",
    "axolotl.yaml --out axolotl.yaml": "is there already",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_refused_in_words(command: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("axolotl.yaml").write_text("base_model: x\n")
    Path("trl.yaml").write_text("model_name_or_path: x\nuse_peft: true\n")
    assert cli.run_verb(["import", *command.split()]) == REFUSED
    assert COMMANDS[command] in capsys.readouterr().err


def test_a_large_file_is_not_read(tmp_path: Path, capsys):
    with open(tmp_path / "weights.yaml", "wb") as file:
        file.truncate(2**30)
    assert cli.run_verb(["import", str(tmp_path / "weights.yaml")]) == REFUSED
    assert "1074 MB" in capsys.readouterr().err


def test_secrets_and_code_are_left_out(tmp_path: Path):
    """Neither the recipe nor the report holds a secret, whatever its key is called; no name of code is carried."""
    secrets = ["hf_" + "a" * 30, "sk-" + "b" * 30, "pass-cc", "ddd-key", "https://me:eee@host.example/x"]
    file = tmp_path / "config.yaml"
    tree = {
        "model_name_or_path": "gpt2", "hub_token": secrets[0], "run_name": secrets[1], "my_password": secrets[2],
        "wandb_api_key": secrets[3],
        "lr_scheduler_kwargs": {"_target_": "os.system", "num_cycles": 2, "at": secrets[4]},
        "lr_scheduler_type": "cosine_with_restarts",
        "notes": ["fine", secrets[0]], "pad_token": "<pad>", "project": "${oc.env:HOME}",
    }  # fmt: skip
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    made = import_config(str(file), check=False)
    everything = made.text + json.dumps(made.to_json())
    for secret in [*secrets, "os.system"]:
        assert secret not in made.text and (secret == "os.system" or secret not in everything), secret
    for key in ("hub_token", "run_name", "my_password", "wandb_api_key", "notes", "lr_scheduler_kwargs.at"):
        assert outcome(made, key) == "left"
    found = values(made)
    assert found["tokenizer.pad_token"] == "<pad>" and found["trainer.lr_scheduler_kwargs.num_cycles"] == 2
    assert outcome(made, "lr_scheduler_kwargs._target_") == "left"
    out = tmp_path / "made.yaml"
    out.write_text(made.text, encoding="utf-8")
    plan = api.compose(str(out), "dataset=alpaca_chat", "trainer.use_cpu=false")
    assert plan.trainer["project"] == "${oc.env:HOME}"  # foreign text is text


BLOCKS = {
    "model_name_or_path: x\nmodel_init_kwargs: {torch_dtype: bf16, low_cpu_mem_usage: 1, trust_remote_code: true}": {
        "model_init_kwargs.torch_dtype": "carried", "model_init_kwargs.low_cpu_mem_usage": "carried",
        "model_init_kwargs.trust_remote_code": "left",
    },
    "model_name_or_path: x\nfsdp: full_shard auto_wrap offload\nfsdp_config: {fsdp_version: 2, xla: true}": {
        "fsdp": "carried", "fsdp_config.fsdp_version": "carried", "fsdp_config.xla": "left",
    },
    "base_model: x\nadapter: qlora\nload_in_4bit: true\nbnb_config_kwargs: {bnb_4bit_quant_type: fp4}": {
        "bnb_config_kwargs.bnb_4bit_quant_type": "carried",
    },
    "base_model: x\ndatasets:\n- path: a/b\n  type: {field_output: out, format: 'Q {input}', no_input_format: Q}": {
        "datasets[0].path": "carried", "datasets[0].type.field_output": "carried",
        "datasets[0].type.format": "carried",
        "datasets[0].type.no_input_format": "left",
    },
    "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, zero3_save_16bit_model: 1, zero3_init_flag: 1}": {
        "deepspeed_config.zero_stage": "carried", "deepspeed_config.zero3_save_16bit_model": "carried",
        "deepspeed_config.zero3_init_flag": "default",
    },
}  # fmt: skip


@pytest.mark.parametrize("text", BLOCKS)
def test_keys_inside_blocks(text: str, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(text)
    made = import_config(str(tmp_path / "config.yaml"), check=False)
    assert {k: outcome(made, k) for k in BLOCKS[text]} == BLOCKS[text]
    every_key_once(made, yaml.safe_load(text))


def test_their_own_defaults_are_written(tmp_path: Path):
    """A file that says nothing more trains as the foreign tool would, not as the kit would."""
    cases = {
        "base_model: gpt2": {"peft": "none", "trainer.max_length": 512, "trainer.save_strategy": "epoch",
                             "trainer.per_device_train_batch_size": 1, "trainer.gradient_checkpointing": False},
        "stage: sft": {"peft.r": 8, "peft.lora_alpha": 16, "trainer.learning_rate": 5e-5, "trainer.max_length": 2048},
        "model_name_or_path: gpt2": {"peft": "none", "trainer.learning_rate": 2e-5, "trainer.num_train_epochs": 3.0,
                                     "trainer.lr_scheduler_type": "linear", "model.dtype": "float32"},
        "model_name_or_path: gpt2\nuse_peft: true": {"peft.lora_dropout": 0.05, "peft.target_modules": None},
    }  # fmt: skip
    for expected in cases.values():
        expected["trainer.packing"] = False
    for number, (text, expected) in enumerate(cases.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text + "\n")
        made = import_config(str(file), check=False)
        assert {k: whole(made).get(k, "MISSING") for k in expected} == expected, text
        assert made.their_defaults


def test_trl_defaults_are_those_of_the_installed_trl():
    """The table is taken from TRL's ModelConfig; a release that changes it must be re-read."""
    from dataclasses import MISSING
    from dataclasses import fields as of

    from trl import ModelConfig, ScriptArguments

    from kit.foreign import training_arguments, trl

    defaults = {f.name: f.default for f in of(ModelConfig) if f.default is not MISSING}
    own = {k: defaults[k if k.startswith("lora_") else f"lora_{k}"] for k in trl.LORA_DEFAULTS}
    assert own == trl.LORA_DEFAULTS
    assert (defaults["dtype"], defaults["use_bnb_nested_quant"], defaults["use_peft"]) == ("float32", False, False)
    assert {f.name: f.default for f in of(ScriptArguments)}["dataset_test_split"] == "test"
    read = {
        *trl.MODEL,
        *trl.LORA,
        *trl.BITS,
        *trl.DATA,
        *training_arguments.NO_COUNTERPART,
        "model_revision",
        "dtype",
        "use_peft",
    }
    read |= {"lora_target_modules", "lora_task_type", "load_in_8bit", "load_in_4bit", "dataset_name"}
    read |= {"dataset_train_split", "dataset_test_split"}
    assert {f.name for c in (ModelConfig, ScriptArguments) for f in of(c)} <= read


def test_accelerate_keys_are_those_of_the_installed_accelerate(tmp_path: Path):
    """Every key that accelerate's own config class writes is known here."""
    from accelerate.commands.config.config_args import ClusterConfig

    names = [n for n in ClusterConfig.__dataclass_fields__ if n not in ("distributed_type", "compute_environment")]
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "NO", **{n: {"a": 1} if n.endswith("_config") else 1
                                                                 for n in names}}))  # fmt: skip
    made = import_config(str(file), check=False)
    assert [e.key for e in made.entries if e.note.startswith("not a key of")] == []


def test_the_command_writes_a_recipe_and_says_what_is_left(here: Path, capsys):
    assert cli.run_verb(["import", "axolotl_qlora.yaml", "--out", "made.yaml"]) == DONE
    shown = capsys.readouterr().out
    assert "axolotl_qlora.yaml: axolotl" in shown and "wandb_project = quiet-alpacas" in shown
    assert "kit train made.yaml" in shown and "their defaults" in shown
    text = (here / "made.yaml").read_text()
    assert text.startswith("# @package _global_\n") and "#   wandb_project:" in text
    assert cli.run_verb(["check", "made.yaml"]) == DONE
    assert cli.run_verb(["import", "llamafactory_full.yaml", "--out", "made.yaml", "--overwrite"]) == REFUSED
    assert "dataset.path is not given" in capsys.readouterr().err
    assert cli.run_verb(["import", "trl_qlora.yaml", "--json", "--from", "trl"]) == DONE
    report = json.loads(capsys.readouterr().out)
    assert {k["key"] for k in report["keys"] if k["outcome"] == "left"} == {
        "trust_remote_code",
        "frobnicate",
    }


def test_no_torch_and_no_trl_are_loaded(here: Path):
    code = (
        "import sys; from kit.cli import verbs as cli; "
        "assert cli.run_verb(['import', 'axolotl_qlora.yaml', '--out', 'made.yaml']) == 0; "
        "heavy = set('torch transformers trl peft deepspeed numpy'.split()); "
        "bad = {n.partition('.')[0] for n in sys.modules} & heavy; "
        "assert not bad, bad"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# What strangers type, in one quoted word: what the recipe holds, or words of the refusal (tests/strangers.py has 904).
TYPED: dict[str, dict | str] = {
    "python train.py --model_name_or_path meta-llama/Llama-2-70b-hf --dataset_name trl-lib/Capybara "
    "--use_peft_lora True --use_4bit_quantization True --bnb_4bit_quant_storage_dtype bfloat16 --splits a,train_x": {
        "quantization": "nf4", "peft.r": 64, "dataset.split": "train_x",
        "quantization.bnb_4bit_quant_storage": "bfloat16",
    },
    "torchrun --nproc_per_node=8 finetune.py --model_name_or_path gpt2 --data_path notes.json --use_lora True "
    "--q_lora True --model_max_length 512 --lora_r 4 --use_flash_attn \\": {
        "quantization": "nf4", "peft.r": 4, "trainer.max_length": 512, "dataset.path": "notes.json",
        "launch.num_gpus": 8, "model.attn_implementation": "flash_attention_2",
    },
    "python finetune.py --base_model gpt2 --data_path notes.json --micro_batch_size 4 --num_epochs 3 --cutoff_len 9 "
    "--lora_r 8 --lora_target_modules '[q_proj,v_proj]'": {
        "model.name_or_path": "gpt2", "trainer.per_device_train_batch_size": 4, "trainer.max_length": 9, "peft.r": 8,
        "trainer.num_train_epochs": 3, "peft.target_modules": ["q_proj", "v_proj"],
    },
    "python qlora.py --model_name_or_path gpt2 --dataset notes.json --bits 4 --double_quant --quant_type nf4 "
    "--lora_modules all --lora_r 64": {
        "quantization": "nf4", "quantization.bnb_4bit_use_double_quant": True, "peft.target_modules": "all-linear",
    },
    "FORCE_TORCHRUN=1 llamafactory-cli train pretrain.yaml \\\n  learning_rate=1e-5 \\\n\n": {
        "dataset.format": "text", "dataset.columns.text": "body", "trainer.packing": True,
        "trainer.learning_rate": 1e-5, "dataset.path": "data/notes.jsonl",
    },
    "accelerate launch --config_file accelerate_fsdp.yaml -m axolotl.cli.train axolotl_chat.yaml": {
        "fsdp.version": 2, "trainer.use_liger_kernel": True,
    },
    "trl sft --model_name_or_path hf-internal-testing/tiny-random-LlamaForCausalLM --dataset_name a/b": {
        "model.name_or_path": "hf-internal-testing/tiny-random-LlamaForCausalLM",
    },
    "python train.py --model_name_or_path gpt2 --data_path notes.json --seed $RANDOM --max_steps ${N}":
        "seed is $RANDOM, which stands for a value",
    "python qlora.py \u2013learning_rate 1e-4 --model_name_or_path gpt2": "type --learning_rate",
    "torchrun train.py --model_name_or_path gpt2 ... other args": "the command is not whole",
    "torchrun train.py $args": "$args stands for words",
    "python run.py --config $CONFIG": "$CONFIG stands for a file",
    "python train.py --model_name_or_path gpt2 --data_path notes.json --freeze_gate True": "freeze_gate = true is not",
    "python train.py --model_name_or_path gpt2 --dataset notes.json --tuner lora": "tuner = lora is not carried",
    "python train_zero_math.py --lr 1 --train_batch_size 4 --model gpt2 --dataset notes.json --bits 16": {
        "trainer.per_device_train_batch_size": 4, "model.name_or_path": "gpt2",
    },
    "python rl.py --train_batch_size 4 --critic_type drgrpo --pretrain gpt2": "(rl) is no supervised",
    "torchrun --nproc_per_node {number of gpus} train.py --model_name_or_path gpt2": "{number ... stands for a value",
    "python qlora.py --model_name_or_path gpt2 --lora_r 8 --source_max_len 16 --target_max_len 8": {
        "peft.r": 8, "trainer.max_length": "MISSING",
    },
    "python train.py --lr 1 --a 1 --b 1 --c 1 --d 1": "4 of 5 keys are of another tool",
    "accelerate launch main.py --model gpt2 --tasks humaneval": "dataset.path is not given",
    "torchrun -m verl.trainer.main_ppo --lr 1": "(ppo) is no supervised fine-tuning",
    "python scripts/reward_modeling.py --model_name_or_path gpt2": "(reward) is no supervised",
    "python evaluation/run.py --model_name_or_path gpt2": "does not train",
    "python open_instruct/merge_lora.py --base_model gpt2": "(merge) does not train",
    "python qlora.py --model_name_or_path gpt2 --do_train False --do_predict": "this run does not train",
    "python sft.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct --dataset_name a/b": "read and write text alone",
    "torchrun train.py --model_name_or_path gpt2 --freeze_backbone True --force_image_size 448": "images or sound",
    "python run.py --model_name_or_path gpt2 --reward_model_path x": "reward",
}  # fmt: skip
OTHER_TOOLS = {
    "LLaMA-Factory v1": "model: gpt2\nmodel_class: llm\ntrain_dataset: x.yaml\nlearning_rate: 1e-4\n",
    "torchtune": "model: {_component_: torchtune.models.llama3}\ndataset: {a: 1}\noptimizer: {lr: 1}\n",
    "verl": "actor_rollout_ref: {a: 1}\nalgorithm: {b: 1}\ntrainer: {c: 1}\n",
    "ms-swift": "model: gpt2\ntuner_type: lora\nlearning_rate: 1e-4\n",
    "trlX": "train: {epochs: 1}\nmodel: {a: 1}\nmethod: {name: ppo}\nscheduler: {name: x}\n",
}


@pytest.mark.parametrize("command", TYPED)
def test_what_strangers_type(command: str, here: Path, capsys):
    """As one quoted word and, where it holds no line break, as the shell would split it."""
    (here / "pretrain.yaml").write_text("stage: pt\nmodel_name_or_path: gpt2\nfinetuning_type: full\ndataset: mine\n")
    (here / "data" / "dataset_info.json").write_text(
        '{"mine": {"file_name": "notes.jsonl", "columns": {"prompt": "body"}}}'
    )
    expected = TYPED[command]
    for words in ([command], shlex.split(command.replace("\\", " "))):
        if isinstance(expected, dict):
            found = whole(import_config(*words, check=False))
            assert {k: found.get(k, "MISSING") for k in expected} == expected
        else:
            assert cli.run_verb(["import", *words]) == REFUSED
            assert expected in capsys.readouterr().err


@pytest.mark.parametrize("tool", OTHER_TOOLS)
def test_files_of_tools_that_are_not_read(tool: str, tmp_path: Path, capsys):
    (tmp_path / "config.yaml").write_text(OTHER_TOOLS[tool])
    assert cli.run_verb(["import", str(tmp_path / "config.yaml")]) == REFUSED
    assert f"the keys of {tool}" in capsys.readouterr().err


def test_a_long_command_in_one_word(here: Path):
    """Longer than a file's name may be, which the system answers with an error."""
    made = import_config(f"trl sft --model_name_or_path gpt2 --dataset_name a/b --run_name {'x' * 5000}", check=False)
    assert values(made)["model.name_or_path"] == "gpt2"


def test_keys_that_only_another_trainer_has_are_not_those_of_axolotl(tmp_path: Path):
    """`debug` and `packing_strategy` are SFTConfig's too, and mean something else there or nothing."""
    text = (
        "base_model: gpt2\nlearning_rate: 1e-4\ndebug: true\ntokens: [<a>]\nfsdp_version: 2\npacking_strategy: ffd\n"
    )
    (tmp_path / "config.yaml").write_text(text)
    made = import_config(str(tmp_path / "config.yaml"), check=False)
    expected = {"debug": "default", "tokens": "carried", "fsdp_version": "default", "packing_strategy": "left"}
    assert {key: outcome(made, key) for key in expected} == expected
