"""The kit fills what transformers and accelerate fill, and knows every key that DeepSpeed reads."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit.config.deepspeed.check import check_deepspeed_json, load_deepspeed_file
from kit.config.deepspeed.filled_keys import FILLED_KEYS, TRAINER_SETTINGS
from kit.config.deepspeed.resolve import SURVIVES_OFFLOAD, resolve_deepspeed_json
from kit.errors import KitError
from kit.forecast.memory import measure_sizes
from kit.schema import fields
from kit.schema.dotted import set_value, value_at

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).parents[2]
FILES = {f.stem: f for f in sorted((ROOT / "ds_configs").glob("*.json"))}
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5, "bf16": True},
    {"per_device_train_batch_size": 1, "max_grad_norm": 0.0, "fp16": True, "learning_rate": 3e-4},
    {"bf16_full_eval": True, "save_on_each_node": True, "weight_decay": 0.1},
]
OWN_BLOCKS: dict[str, Any] = {  # not in our files, but in people's
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
}


def precision(trainer: dict[str, Any]) -> Any:
    return next((DTYPES[k] for k in DTYPES if trainer.get(k)), "float32")


def resolve(ds: dict[str, Any], trainer: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    trainer = trainer or {}
    given = {"world_size": 1, "hidden_size": 64, "precision": precision(trainer)} | given
    return resolve_deepspeed_json(ds, trainer=trainer, **given)


def filled_upstream(ds: dict[str, Any], trainer: dict[str, Any], world_size: int, hidden_size: int, steps: int) -> Any:
    """The same file through the two libraries' own code, with the arguments that SFTConfig would have."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    values = {name: fields.field_default("SFTConfig", name) for name in fields.field_names("SFTConfig")}
    args = SimpleNamespace(**values | {"bf16": False, "world_size": world_size} | trainer)
    args.get_warmup_steps = TrainingArguments.get_warmup_steps.__get__(args)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    config = HfTrainerDeepSpeedConfig(copy.deepcopy(ds))
    config.trainer_config_process(args)
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    config.trainer_config_finalize(args, model, steps)
    unset_hf_deepspeed_config()
    plugin.deepspeed_config.pop("steps_per_print")  # accelerate's own, to silence DeepSpeed
    return plugin.deepspeed_config


@pytest.mark.parametrize("world_size, hidden_size", [(1, 64), (8, 4096)])
@pytest.mark.parametrize("trainer", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("name", FILES)
def test_fills_what_upstream_fills(name: str, trainer: dict[str, Any], world_size: int, hidden_size: int) -> None:
    given = load_deepspeed_file(FILES[name])
    mine = resolve(given, trainer, world_size=world_size, hidden_size=hidden_size)
    assert '"auto"' not in json.dumps(mine)
    theirs = filled_upstream(given, trainer, world_size, hidden_size, 100)
    assert mine.pop("zero_allow_untested_optimizer") is True  # set by transformers when it makes the optimizer
    assert mine.pop("steps_per_print") == given["steps_per_print"]
    assert mine == theirs
    assert filled_upstream(mine, trainer, world_size, hidden_size, 100) == mine  # no mismatch, nothing left to fill


@pytest.mark.parametrize("warmup, steps", [(0, 20), (7, 20), (0.1, 55)])
def test_optimizer_and_scheduler_blocks_too(warmup: float, steps: int) -> None:
    given = load_deepspeed_file(FILES["zero2"]) | copy.deepcopy(OWN_BLOCKS)
    trainer = {"max_steps": steps, "warmup_steps": warmup, "learning_rate": 5e-5, "weight_decay": 0.01}
    mine = resolve(given, trainer)
    theirs = filled_upstream(given, trainer, 1, 64, steps)
    assert {k: mine[k] for k in OWN_BLOCKS} == {k: theirs[k] for k in OWN_BLOCKS}
    assert "zero_allow_untested_optimizer" not in mine
    assert filled_upstream(mine, trainer, 1, 64, steps)["scheduler"] == mine["scheduler"]


def all_auto() -> dict[str, Any]:
    """A JSON in which all keys of the table that hold an "auto" hold one."""
    ds: dict[str, Any] = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupDecayLR"}}
    for key, row in FILLED_KEYS.items():
        if row.filled_by != "added":
            set_value(ds, key, "auto")
    set_value(ds, "zero_optimization.stage", 3)
    return ds


CHANGES = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "learning_rate": 1e-3,
    "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3, "weight_decay": 0.3, "warmup_steps": 7,
    "bf16": True, "bf16_full_eval": True, "fp16": True, "fp16_full_eval": True, "save_on_each_node": True,
}  # fmt: skip


def test_upstream_fills_the_keys_of_the_table_from_its_sources() -> None:
    """A change of one setting changes in transformers' JSON the keys that the table says, and no other."""
    before = filled_upstream(all_auto(), {}, 2, 64, 50)
    after = {
        f"trainer.{name}": filled_upstream(all_auto(), {name: value}, 2, 64, 50) for name, value in CHANGES.items()
    }
    after["trainer.max_steps"] = filled_upstream(all_auto(), {}, 2, 64, 70)
    after["launch.num_gpus"] = filled_upstream(all_auto(), {}, 4, 64, 50)
    after["model.config.hidden_size"] = filled_upstream(all_auto(), {}, 2, 128, 50)
    for source, filled in after.items():
        keys = {k for k in FILLED_KEYS if value_at(before, k) != value_at(filled, k)}
        assert keys == {k for k, row in FILLED_KEYS.items() if source in row.sources}, source
    sources = {source for row in FILLED_KEYS.values() for source in row.sources}
    # bf16 and fp16 once more; set when the optimizer is made; the kit's own
    assert sources == {*after, "precision", "trainer.optim", "model.config.model_type"}


def test_upstream_fills_every_constant_of_the_table() -> None:
    filled = filled_upstream(all_auto(), {}, 2, 64, 50)
    for key, row in FILLED_KEYS.items():
        if row.filled_by == "constant":
            assert value_at(filled, key) in (row.constant, "none"), (
                key
            )  # no path: accelerate's word, or the key left out
    assert not [key for key in FILLED_KEYS if value_at(filled, key) == "auto"]


def test_every_auto_of_the_table_is_filled_as_upstream_fills_it() -> None:
    ours = resolve(all_auto(), total_steps=50, world_size=2)
    theirs = filled_upstream(all_auto(), {}, 2, 64, 50)
    for key, row in FILLED_KEYS.items():
        if row.filled_by != "added":
            assert value_at(ours, key) == value_at(theirs, key) or key.endswith("nvme_path"), key


@pytest.mark.parametrize("key", [k for k, row in FILLED_KEYS.items() if row.filled_by != "added"])
def test_upstream_compares_literals_with_the_settings_of_the_table(key: str) -> None:
    ds = all_auto()
    set_value(ds, key, {"optimizer.params.betas": [0.5, 0.6]}.get(key, 7) if "enabled" not in key else True)
    if key in TRAINER_SETTINGS:
        with pytest.raises(ValueError, match=rf"ds {re.escape(key)}="):
            filled_upstream(ds, {}, 2, 64, 50)
    else:
        assert value_at(filled_upstream(ds, {}, 2, 64, 50), key) == 7


@pytest.mark.parametrize("name", FILES)
def test_deepspeed_reads_the_result(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    trainer = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "bf16": True}
    read = DeepSpeedConfig(resolve(load_deepspeed_file(FILES[name]), trainer))
    assert (read.train_batch_size, read.gradient_accumulation_steps, read.gradient_clipping) == (6, 3, 1.0)
    assert read.bfloat16_config.enabled and not read.float16_config.enabled
    assert read.zero_config.stage == int(re.findall(r"\d", name)[0])
    assert read.zero_config.overlap_comm is (name not in ("zero1", "zero2"))  # DeepSpeed's own default there


LAYERS = ["LlamaDecoderLayer"]
LEAVES = "zero_optimization.leaf_module"
OTHERWISE: list[tuple[str, str, Any]] = [  # file, key that keeps modules gathered one by one, its value
    ("zero2", "steps_per_print", 1),
    ("zero3_nvme", "steps_per_print", 1),
    ("zero3", "zero_optimization.zero_hpz_partition_size", 2),
    ("zero3", "zero_optimization.stage3_module_granularity_threshold", 1000),
    ("zero3", "compile.deepcompile", True),
]


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_decoder_layers_are_leaf_modules(name: str) -> None:
    """In the JSON that a run gets, as DeepSpeed reads it; what the file says of leaf modules is kept, [] too."""
    from deepspeed.runtime.config import DeepSpeedConfig

    given = load_deepspeed_file(FILES[name])
    filled = resolve(given, decoder_layers=LAYERS)
    assert value_at(filled, LEAVES) == {"classes": LAYERS}
    assert DeepSpeedConfig(filled).zero_config.leaf_module.classes == LAYERS
    for own in ({"classes": []}, {"classes": ["Other"]}, {"names": ["model.norm"]}):
        set_value(given, LEAVES, own)
        assert value_at(resolve(given, decoder_layers=LAYERS), LEAVES) == own


LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_next_layer_is_gathered_ahead() -> None:
    """Embedding and head of this base are more than DeepSpeed's 1e9 live parameters: with these none is.

    Numbers that a file gives are kept, and "auto" is what transformers makes of it.
    """
    lora = {"peft_type": "LORA", "r": 16, "target_modules": "all-linear"}
    sizes = measure_sizes(LLAMA_8B, lora)
    assert sizes and sizes.ends == 2 * 128256 * 4096 + 4096 and sizes.ends > 1e9
    given = load_deepspeed_file(FILES["zero3"])
    names = ["stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold"]
    layer = 218_112_000
    filled = resolve(given, decoder_layers=LAYERS, sizes=sizes, hidden_size=4096)["zero_optimization"]
    assert filled["stage3_prefetch_bucket_size"] == filled["stage3_max_reuse_distance"] == sizes.largest_layer == layer
    assert filled["stage3_max_live_parameters"] == sizes.ends + 3 * layer
    assert filled["stage3_param_persistence_threshold"] == 16 * 14336  # a whole low-rank matrix
    given["zero_optimization"] |= dict(zip(names, ("auto", 7, 8), strict=True))
    kept = resolve(given, decoder_layers=LAYERS, sizes=sizes, hidden_size=4096)["zero_optimization"]
    assert [kept[name] for name in names] == [int(0.9 * 4096 * 4096), 7, 8]
    large = measure_sizes(LLAMA_8B, lora | {"r": 256})
    filled = resolve(load_deepspeed_file(FILES["zero3"]), decoder_layers=LAYERS, sizes=large, hidden_size=4096)
    assert filled["zero_optimization"]["stage3_param_persistence_threshold"] == 40960  # too large to keep
    apart = load_deepspeed_file(FILES["zero3"])
    set_value(apart, LEAVES, {"classes": []})  # module by module too
    filled = resolve(apart, sizes=sizes, decoder_layers=LAYERS, hidden_size=4096)["zero_optimization"]
    assert [filled[name] for name in names] == [layer, sizes.ends + 3 * layer, 229_376]
    for name in ("zero2", "zero3_nvme"):
        given = load_deepspeed_file(FILES[name])
        other = resolve(given, sizes=sizes, decoder_layers=LAYERS, hidden_size=4096)["zero_optimization"]
        assert other.get(names[1]) == given["zero_optimization"].get(names[1])


@pytest.mark.parametrize("name, key, value", OTHERWISE)
def test_decoder_layers_stay_apart_where_that_was_not_tried(name: str, key: str, value: Any) -> None:
    given = load_deepspeed_file(FILES[name])
    set_value(given, key, value)
    assert value_at(resolve(given, decoder_layers=LAYERS), LEAVES) is None


def test_compiled_models_keep_their_modules_apart() -> None:
    given = load_deepspeed_file(FILES["zero3"])
    assert value_at(resolve(given, {"torch_compile": True}, decoder_layers=LAYERS), LEAVES) is None


def test_missing_keys_are_emitted() -> None:
    """Left out, DeepSpeed would accumulate once and clip at its own default."""
    got = resolve({"zero_optimization": {"stage": 1}}, {"gradient_accumulation_steps": 4, "max_grad_norm": 0.3})
    assert got == {
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 32,
        "gradient_clipping": 0.3,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
    }


def test_words_of_its_own_and_numbers() -> None:
    """DeepSpeed's own "auto" words are left out, 2e8 is a whole number, the caller's dict is not touched."""
    given = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 2e8, "offload_param": {"device": "auto"}},
        "data_types": {"keep_in_fp32_modules": "auto"},
    }
    before = copy.deepcopy(given)
    got = resolve(given)
    assert given == before
    assert json.dumps(got["zero_optimization"]["reduce_bucket_size"]) == "200000000"
    assert got["data_types"] == {}
    assert got["zero_optimization"]["offload_param"] == {"device": "none"}


ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
CPU = {"device": "cpu"}
DISAGREES = [
    (ZERO2 | {"train_batch_size": 7}, {}, "train_batch_size", "is 7, but"),
    (ZERO2 | {"gradient_clipping": 0.5}, {}, "gradient_clipping", "trainer.max_grad_norm makes it 1.0"),
    (ZERO2 | {"train_micro_batch_size_per_gpu": 4}, {}, "train_micro_batch_size_per_gpu", "makes it 8"),
    (ZERO2 | {"fp16": {"enabled": True}}, {}, "fp16.enabled", "float32"),
    (ZERO2 | {"bf16": {"enabled": False}}, {"bf16": True}, "bf16.enabled", "bfloat16"),
    (ZERO2 | {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, {}, "optimizer.params.lr", "2e-05"),
    (ZERO2 | {"optimizer": {"type": "Adam"}}, {"optim": "adafactor"}, "optimizer", "ignored"),
    (ZERO2 | {"scheduler": {"type": "WarmupDecayLR"}}, {}, "scheduler.params.total_num_steps", "number of steps"),
    (ZERO2 | {"scheduler": {"type": "WarmupLR"}}, {"warmup_steps": 0.1}, "scheduler.params.warmup_num_steps", "share"),
    ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, {},
     "zero_optimization.compute_grad_norm", "clip"),
]  # fmt: skip


@pytest.mark.parametrize("ds, trainer, key, said", DISAGREES)
def test_a_literal_against_the_trainer(ds: dict[str, Any], trainer: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(KitError) as caught:
        resolve(ds, trainer)
    problems = {p.where: p for p in caught.value.problems}
    assert list(problems) == [f"deepspeed.{key}"]
    assert said in problems[f"deepspeed.{key}"].problem
    assert problems[f"deepspeed.{key}"].fix


def test_offload_keeps_the_optimizer_that_was_asked_for() -> None:
    ds = {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}}
    for optim in ("adamw_8bit", "paged_adamw_32bit", "adafactor", "adagrad"):
        with pytest.raises(KitError, match=f"trainer.optim={optim} by plain CPU Adam"):
            resolve(ds, {"optim": optim})
        resolve(ds | {"zero_force_ds_cpu_optimizer": False}, {"optim": optim})
    for optim in SURVIVES_OFFLOAD:
        resolve(ds, {"optim": optim})


def test_all_problems_at_once_and_bad_trainer_values_do_not_crash() -> None:
    with pytest.raises(KitError) as caught:
        resolve(ZERO2 | {"gradient_cliping": 1, "train_batch_size": 7, "gradient_clipping": 9}, {"max_steps": "many"})
    assert len(caught.value.problems) == 3
    resolve(ZERO2, {"per_device_train_batch_size": "8", "max_grad_norm": None, "warmup_steps": []})


def test_an_unknown_width_is_said() -> None:
    with pytest.raises(KitError, match="width of the model is not known") as caught:
        resolve(load_deepspeed_file(FILES["zero3"]), hidden_size=None)
    assert "model.config" in caught.value.problems[0].fix
    resolve(ZERO2, hidden_size=None)


ZERO3 = {"stage": 3}
CHECKED = [
    ({"zero_optimisation": {"stage": 2}, **ZERO2}, "zero_optimisation", "zero_optimization?"),
    (ZERO2 | {"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
    (ZERO2 | {"bfloat": {"enabled": True}}, "bfloat", "bf16"),
    (ZERO2 | {"bfloat16": {"enabled": True}}, "bfloat16", "bf16"),
    (ZERO2 | {"amp": {"enabled": True}}, "amp", "fp16 or bf16"),
    (ZERO2 | {"elasticity": {}}, "elasticity", "train_micro_batch_size_per_gpu"),
    ({"zero_optimization": True}, "zero_optimization", "stage=1"),
    ({}, "zero_optimization", "stage=2"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", ""),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage", "2"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com", "overlap_comm"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload", "offload_optimizer"),
    ({"zero_optimization": ZERO3 | {"stage3_gather_fp16_weights_on_model_save": True}},
     "zero_optimization.stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
    ({"zero_optimization": ZERO3 | {"prefetch_bucket_size": "auto"}}, "zero_optimization.prefetch_bucket_size",
     "name it stage3_prefetch_bucket_size"),
    ({"zero_optimization": ZERO3 | {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}},
     "zero_optimization.prefetch_bucket_size", "keep one"),
    ({"zero_optimization": ZERO3 | {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size", "hpz"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.9}}, "zero_optimization.reduce_bucket_size", "round"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "zero_optimization.overlap_comm", "no library"),
    ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, "zero_optimization.offload_param", "stage=3"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": CPU}}, "zero_optimization.offload_optimizer", "stage=2"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
     "zero_optimization.offload_optimizer.device", "stage=3"),
    ({"zero_optimization": ZERO3 | {"offload_param": {"device": "nvme"}}},
     "zero_optimization.offload_param.nvme_path", "NVMe disk"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": CPU | {"ratio": 0.5}}},
     "zero_optimization.offload_optimizer.ratio", "stage=3"),
    ({"zero_optimization": ZERO3 | {"compute_grad_norm": False}}, "zero_optimization.compute_grad_norm", "true"),
    ({"zero_optimization": ZERO3 | {"elastic_checkpoint": True}}, "zero_optimization.elastic_checkpoint", "remove"),
    (ZERO2 | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled", "auto"),
    ({"zero_optimization": ZERO3, "gradient_allreduce_op": "sum"}, "gradient_allreduce_op", "mean"),
    (ZERO2 | {"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "both"),
    (ZERO2 | {"steps_per_print": "auto"}, "steps_per_print", "no library fills"),
    (ZERO2 | {"scheduler": {"type": "WarmupLr"}}, "scheduler.type", "WarmupLR"),
    (ZERO2 | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
     "scheduler.params.warmup_num_steps", ""),
    (ZERO2 | {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
     "scheduler.params.total_num_steps", ""),
    (ZERO2 | {"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}},
     "optimizer.params.max_grad_norm", "gradient_clipping"),
    (ZERO2 | {"communication_data_type": "fp8"}, "communication_data_type", "bf16"),
    (ZERO2 | {"sequence_parallel_size": 2}, "sequence_parallel_size", "remove it"),
]  # fmt: skip


@pytest.mark.parametrize("ds, key, fix", CHECKED)
def test_checked(ds: dict[str, Any], key: str, fix: str) -> None:
    problems = check_deepspeed_json(ds)
    assert [p.where for p in problems] == [f"deepspeed.{key}"]
    assert fix in problems[0].fix


def test_optimizer_params_are_free() -> None:
    """They go to whatever optimizer is named, so names that we do not know are not refused."""
    block = {"optimizer": {"type": "Muon", "params": {"lr": "auto", "momentum": 0.9, "muon_lr": 0.1}}}
    assert check_deepspeed_json(ZERO2 | block) == []


@pytest.mark.parametrize(
    "text, place, said",
    [
        ('{"a": 1,}', "line 1 column", "not valid JSON"),
        ('{\n  // note\n  "a": 1}', "line 2 column", "not valid JSON"),
        ('{"fp16": {},\n "fp16": {}}', "lines 1, 2", "given twice"),
        ("[]", "", "one block"),
        ("", "line 1", "not valid JSON"),
        ('{"a": NaN}', "", "NaN is not JSON"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, place: str, said: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(KitError, match=said) as caught:
        load_deepspeed_file(file)
    assert str(file) in caught.value.problems[0].where and place in caught.value.problems[0].where
    with pytest.raises(KitError, match="cannot read"):
        load_deepspeed_file(tmp_path / "none.json")


def test_no_key_of_the_installed_deepspeed_is_missing() -> None:
    """Search its source for what it reads from the JSON: a key of a newer release fails here, not at a user."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    readers = ["runtime/config.py", "runtime/precision_config.py", "runtime/activation_checkpointing/config.py"]
    readers += ["runtime/swap_tensor/aio_config.py", "runtime/model_checkpointing/config.py", "profiling/config.py"]
    readers += ["runtime/data_pipeline/config.py", "monitor/config.py", "autotuning/config.py", "utils/config.py"]
    readers += ["comm/config.py", "datastates/config.py", "module_inject/auto_ep_config.py"]
    readers += ["runtime/tensor_parallel/config.py"]
    names = r"""((?:[A-Z][A-Z0-9_]+)|(?:"\w+")|(?:'\w+'))"""
    holder = r"(?:_?param_dict|\w+_dict|\w+_params|ds_config|config)"
    patterns = [
        rf"get_(?:scalar|dict)_param\(\s*{holder}(?:\[\w+\])?,\s*{names}",
        rf"{holder}\.get\({names}",
        rf"{names} (?:not )?in (?:self\.)?{holder}\b",
        rf"\b{holder}\[{names}\]",
    ]
    found = set()
    for reader in readers:
        module = importlib.import_module("deepspeed." + reader.removesuffix(".py").replace("/", "."))
        text = (root / reader).read_text()
        for name in {n for pattern in patterns for n in re.findall(pattern, text)}:
            found.add(name.strip("\"'") if name[0] in "\"'" else getattr(module, name))
    assert len(found) > 100
    known = {
        key for table in fields.field_tables() if table.startswith("deepspeed") for key in fields.field_tables()[table]
    }
    deeper = {"curriculum_metrics", "max_tokens", "lr_scaling_method", "min_batch_size", "max_batch_size", "verbose"}
    deeper |= {"sequence_picking_order", "random_ltd_layer_token_lr_schedule", "profile"}  # inside free-form blocks
    old = {"allgather_size", "mics_shard_size"}  # read only for zero_optimization: true, or to refuse it
    assert {key for key in found - known - deeper - old if not key.startswith("_")} == set()


def test_top_level_attributes_of_deepspeed_config_are_known() -> None:
    """Every getter that DeepSpeedConfig calls on the whole JSON names a key of our top-level table."""
    import inspect

    from deepspeed.runtime import config as runtime

    top = set(fields.field_tables()["deepspeed"])
    getters = re.findall(r"= (get_\w+)\(param_dict\)", inspect.getsource(runtime.DeepSpeedConfig._initialize_params))
    assert len(getters) > 30
    for getter in getters:
        source = inspect.getsource(getattr(runtime, getter))
        words = set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", source))
        space = inspect.getmodule(getattr(runtime, getter)).__dict__
        keys = {space[w] for w in words if isinstance(space.get(w), str)} | set(re.findall(r"[\"'](\w+)[\"']", source))
        assert keys & top, getter
