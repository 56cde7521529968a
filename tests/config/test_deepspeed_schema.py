"""The table of DeepSpeed's JSON against the installed DeepSpeed: every model's fields, every key that its reader asks.

A new release says here which key is new, gone, or of another kind; then `python tests/config/make_fields.py`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import make_fields
import pytest

from kit.config.deepspeed.check import check_deepspeed_json
from kit.schema import fields

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Asked of the JSON by other parts than its reader: the key -> the file that reads it.
ELSEWHERE = {
    "sequence_parallel_size": "runtime/config.py", "data_parallel_size": "__init__.py",
    "bfloat16": "runtime/precision_config.py",
}  # fmt: skip
# Blocks that a plain reader takes apart; the others are pydantic models.
PLAIN = ["checkpoint", "aio", "data_types", "torch_autocast", "flops_profiler", "activation_checkpointing",
         "autotuning", "optimizer", "scheduler", "data_efficiency", "timers"]  # fmt: skip


class Asked(dict):
    """A block that notes which of its keys are asked for, and hands out blocks that do so too."""

    def __init__(self, values: dict[str, Any], notes: dict[str, set[str]], name: str = "") -> None:
        super().__init__({k: Asked(v, notes, f"{name}.{k}".strip(".")) if isinstance(v, dict) else v
                          for k, v in values.items()})  # fmt: skip
        self.notes, self.name = notes.setdefault(name, set()), name

    def note(self, key: Any) -> None:
        self.notes.add(key)

    def __getitem__(self, key: Any) -> Any:
        self.note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.note(key)
        return super().get(key, default)

    def __contains__(self, key: Any) -> bool:
        self.note(key)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # `x in block.keys()` is how half of the readers ask

    def __copy__(self) -> Asked:
        return self

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(self)


@pytest.fixture(scope="module")
def asked() -> dict[str, set[str]]:
    """{dotted block: keys} that DeepSpeedConfig asks for, reading a JSON that holds every block."""
    from deepspeed.runtime.config import DeepSpeedConfig

    notes: dict[str, set[str]] = {}
    sub = {"enabled": False}
    blocks: dict[str, Any] = {name: {} for name in PLAIN if name not in ("optimizer", "scheduler")}
    blocks |= {
        "optimizer": {"type": "AdamW", "params": {}}, "scheduler": {"type": "WarmupLR", "params": {}},
        "checkpoint": {"parallel_write": {}, "writer": {}}, "timers": {"throughput": {}},
        "autotuning": {"enabled": True}, "torch_autocast": {"enabled": True, "dtype": "bf16"},
        "data_efficiency": {
            "data_sampling": {"curriculum_learning": dict(sub), "dynamic_batching": dict(sub)},
            "data_routing": {"random_ltd": dict(sub)},
        },
        "zero_optimization": {"stage": 1}, "train_batch_size": 1, "steps_per_print": 1,
    }  # fmt: skip
    DeepSpeedConfig(Asked(blocks, notes))
    return notes


def test_no_key_that_deepspeed_reads_at_the_top_is_unknown(asked: dict[str, set[str]]) -> None:
    known = set(fields.field_tables()["deepspeed"])
    assert asked[""] - known == set()
    assert len(asked[""]) > 50


def test_every_key_of_ours_is_read(asked: dict[str, set[str]]) -> None:
    """What the reader does not ask for stands in the source of the file that does."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    assert set(fields.field_tables()["deepspeed"]) - asked[""] <= set(ELSEWHERE)
    for key in ELSEWHERE:
        text = (root / ELSEWHERE[key]).read_text()
        assert re.search(rf"['\"]{key}['\"]", text), key


def test_the_blocks_without_a_model(asked: dict[str, set[str]]) -> None:
    """Their readers ask for these keys; a reader may be elsewhere, so ours may know more."""
    deeper = {name: keys for name, keys in asked.items() if name.split(".")[0] in PLAIN}
    assert len(deeper) >= 15, deeper
    for name, keys in deeper.items():
        table = fields.field_tables().get(f"deepspeed.{name}")
        if table is not None and not name.endswith("params"):
            assert keys - set(table) == set(), name


def test_the_names_are_constants_that_the_reader_imports() -> None:
    """The constants in `runtime/config.py` whose value is a key: read from its syntax tree, not by running it."""
    from deepspeed.runtime import config as runtime

    tree = ast.parse(inspect.getsource(runtime))
    reader = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "DeepSpeedConfig")
    getters = {n.func.id for n in ast.walk(reader) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    known = {key for t in fields.field_tables() if t.startswith("deepspeed") for key in fields.field_tables()[t]}
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name not in getters:
            continue
        for call in ast.walk(node):
            named = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "get_scalar_param"
            if named and isinstance(call.args[1], ast.Name) and call.args[1].id.isupper():
                found.add(getattr(runtime, call.args[1].id))
    assert len(found) == 20, found
    assert found - known == set()


def models() -> dict[str, str]:
    """{table: class} of every table that is one of DeepSpeed's own models."""
    roots = {
        "deepspeed.zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
        "deepspeed.fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
        "deepspeed.bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
        "deepspeed.comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
        "deepspeed.tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
        "deepspeed.wandb": "deepspeed.monitor.config.WandbConfig",
        "deepspeed.csv_monitor": "deepspeed.monitor.config.CSVConfig",
        "deepspeed.comet": "deepspeed.monitor.config.CometConfig",
        "deepspeed.hybrid_engine": "deepspeed.runtime.config.HybridEngineConfig",
        "deepspeed.weight_quantization": "deepspeed.inference.config.WeightQuantConfig",
        "deepspeed.compile": "deepspeed.compile.config.CompileConfig",
        "deepspeed.tensor_parallel": "deepspeed.runtime.tensor_parallel.config.TPTrainingConfig",
        "deepspeed.timers.throughput": "deepspeed.utils.config.DeepSpeedThroughputTimerConfig",
    }
    nested = {
        entry["table"]: entry["class"]
        for name in roots
        for entry in fields.field_tables()[name].values()
        if entry.get("class", "").startswith("deepspeed.") and "table" in entry
    }
    return roots | nested


@pytest.mark.parametrize("table", models())
def test_a_model_field_by_field(table: str) -> None:
    """Names and aliases, defaults, and a value of every kind that we accept and refuse, tried on the model itself."""
    from pydantic import ValidationError

    module, _, name = models()[table].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    ours = fields.field_tables()[table]
    differ = []
    names = set(cls.model_fields) | {f.alias for f in cls.model_fields.values() if f.alias}
    assert {k for k, e in ours.items() if not e.get("removed")} == names
    samples: dict[str, Any] = {"dict": {}, "list": [], "str": "nonsense", "float": 1.5, "int": 3, "bool": True}
    for key, entry in ours.items():
        field = cls.model_fields.get(key) or next((f for f in cls.model_fields.values() if f.alias == key), None)
        if field is None or entry.get("instead"):
            continue
        default = make_fields.plain(field.get_default(call_default_factory=True))
        assert entry.get("required") or entry["default"] == default, key
        for kind, value in samples.items():
            refused = bool(fields.check_fields(table, {key: value}))
            if (kind == "bool" and refused) or (table, key) == ("deepspeed.tensor_parallel", "dtype"):
                continue  # pydantic takes true for 1; no JSON holds a torch.dtype, which check_deepspeed_json says
            try:
                cls(**{key: value})
                taken = True
            except (ValidationError, ValueError, TypeError, AssertionError):
                taken = False
            if taken is refused:
                differ.append((table, key, kind, taken))
    assert not differ


def test_optimizers_and_schedulers_are_deepspeeds_own() -> None:
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES

    types = fields.field_tables()["deepspeed.optimizer"]["type"]["choices"]
    assert {t.lower() for t in types} >= set(DEEPSPEED_OPTIMIZERS)
    assert all(t.lower() in DEEPSPEED_OPTIMIZERS or hasattr(torch.optim, t) for t in types)
    assert fields.field_tables()["deepspeed.scheduler"]["type"]["choices"] == list(VALID_LR_SCHEDULES)
    adam = set(fields.field_tables()["deepspeed.optimizer.adam"])
    for cls in (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam):
        assert set(inspect.signature(cls).parameters) - adam <= {"params", "model_params"}


def test_removed_keys_have_a_word_for_each() -> None:
    from deepspeed.runtime import config as runtime

    for key in runtime._REMOVED_TOP_LEVEL_CONFIG_KEYS:
        assert fields.field_tables()["deepspeed"][key]["removed"] is True
        with pytest.raises(runtime.DeepSpeedConfigError):
            runtime.DeepSpeedConfig({"train_batch_size": 1, key: {}})
    for key in runtime._REMOVED_ZERO_CONFIG_KEYS:
        assert fields.field_tables()["deepspeed.zero_optimization"][key]["removed"] is True


def test_auto_is_allowed_where_transformers_or_accelerate_fill_it() -> None:
    """Every key that we let be "auto" is named in their source; of all others DeepSpeed drops it without a word."""
    import accelerate.utils.dataclasses as plugin
    import transformers.integrations.deepspeed as hf

    source = inspect.getsource(hf) + inspect.getsource(plugin.DeepSpeedPlugin)
    tables = fields.field_tables()
    allowed = {(t, k) for t in tables if t.startswith("deepspeed") for k, e in tables[t].items() if e.get("auto")}
    for table, key in allowed:
        assert f'"{key}"' in source or f".{key}" in source, (table, key)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(stage=2, allgather_bucket_size="auto").allgather_bucket_size == 5e8  # dropped
    [problem] = check_deepspeed_json({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}})
    assert problem.where == "deepspeed.zero_optimization.allgather_bucket_size"
