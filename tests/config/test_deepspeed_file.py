"""`kit check --deepspeed FILE`: every fault of a foreign file with its line, what "auto" becomes, and --fix."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import source_ds
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.cli import verbs as cli
from kit.config.deepspeed import fixes, json_edit
from kit.config.deepspeed.against_run import RunSettings, describe_autos, fill_for_run
from kit.config.deepspeed.check import load_deepspeed_file
from kit.config.deepspeed.findings import find_faults
from kit.config.deepspeed.resolve import resolve_deepspeed_json
from kit.errors import DONE, REFUSED, KitError
from kit.schema import fields
from kit.schema.dotted import value_at

ROOT = Path(__file__).parents[2]
OURS = sorted((ROOT / "ds_configs").glob("*.json"))
AUTOS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"},
}  # fmt: skip


def whole(zero: Any = None, **more: Any) -> dict[str, Any]:
    """A file without fault, and what is to be wrong in it."""
    return copy.deepcopy(AUTOS) | {"zero_optimization": {"stage": 2} if zero is None else zero} | more


def mended(tree: Any) -> tuple[dict[str, Any], list[str], list[str]]:
    """(the file after --fix, what was done, keys of what is left)."""
    text = tree if isinstance(tree, str) else json.dumps(tree, indent=2)
    after, changes = fixes.apply_fixes(text, find_faults)
    left = find_faults(after)
    assert not [f for f in left if f.edits]
    assert fixes.apply_fixes(after, find_faults) == (after, [])
    return json.loads(after), [c.did for c in changes], [f.key for f in left]


# --- the four files of the sources ---------------------------------------------------------------------------------

FAULTS = {
    "catalogue_zero1": {
        ("missing", "gradient_accumulation_steps"), ("missing", "gradient_clipping"), ("missing", "bf16.enabled"),
        ("renamed-key", "zero_optimization.cpu_offload"),
    },
    "catalogue_zero2": {
        ("missing", "gradient_accumulation_steps"), ("missing", "gradient_clipping"), ("missing", "bf16.enabled"),
        ("optimizer", "optimizer"),
    },
    "catalogue_zero3": {("optimizer", "optimizer")},
    "doctor_zero2": {
        ("literal", "train_batch_size"), ("literal", "train_micro_batch_size_per_gpu"),
        ("literal", "gradient_accumulation_steps"), ("optimizer", "optimizer"), ("missing", "gradient_clipping"),
        ("missing", "fp16.enabled"), ("missing", "bf16.enabled"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", source_ds.FILES)
def test_the_faults_of_the_sources_files(name: str) -> None:
    text = json.dumps(source_ds.FILES[name], indent=2)
    assert {(f.rule, f.key) for f in find_faults(text)} == FAULTS[name]
    tree, _, left = mended(text)
    assert left == []
    zero, before = tree["zero_optimization"], source_ds.FILES[name]["zero_optimization"]
    assert zero == {k: v for k, v in before.items() if k != "cpu_offload"}
    assert "optimizer" not in tree
    assert {k: tree[k] for k in AUTOS if "enabled" not in str(AUTOS[k])} == {
        k: "auto" for k in AUTOS if "enabled" not in str(AUTOS[k])
    }


def test_what_the_doctors_literals_become_is_said() -> None:
    """What stood in the file is to be given to the trainer, or it would be lost."""
    _, changes = fixes.apply_fixes(json.dumps(source_ds.FILES["doctor_zero2"], indent=2), find_faults)
    keep = "; ".join(c.keep for c in changes)
    for told in ("processes = 64", "per_device_train_batch_size=16", "gradient_accumulation_steps=1",
                 "learning_rate=0.001", "adam_beta1=0.9, adam_beta2=0.999", "adam_epsilon=1e-08"):  # fmt: skip
        assert told in keep


@pytest.mark.parametrize("file", OURS, ids=lambda f: f.stem)
def test_our_own_files_are_without_fault(file: Path) -> None:
    assert find_faults(file.read_text()) == []


# --- one fault each: (file, the key that is named, what is at the key after --fix, or MISSING, or LEFT) --------------

MISSING, LEFT = "<missing>", "<left>"
ZERO3 = {"stage": 3}
MENDED = [
    (whole(train_batch_sise="auto"), "train_batch_sise", {"train_batch_size": "auto", "train_batch_sise": MISSING}),
    (whole(bfloat16={"enabled": "auto"}), "bfloat16", {"bfloat16": MISSING, "bf16.enabled": "auto"}),
    ({k: v for k, v in whole(bfloat16={"enabled": True}).items() if k != "bf16"}, "bfloat16",
     {"bf16.enabled": "auto", "bfloat16": MISSING}),
    (whole(True), "zero_optimization", {"zero_optimization.stage": 1}),
    (whole(False), "zero_optimization", {"zero_optimization.stage": 0}),
    ({**AUTOS, "zero_optimization": None}, "zero_optimization", LEFT),
    (whole(fp16=None), "fp16", {"fp16.enabled": "auto"}),
    (whole(3), "zero_optimization", {"zero_optimization.stage": 3}),
    (whole({"stage": "2"}), "zero_optimization.stage", {"zero_optimization.stage": 2}),
    (whole({"stage": 2, "cpu_offload": True}), "zero_optimization.cpu_offload",
     {"zero_optimization.offload_optimizer": {"device": "cpu"}, "zero_optimization.cpu_offload": MISSING}),
    (whole({"stage": 2, "cpu_offload": False}), "zero_optimization.cpu_offload",
     {"zero_optimization": {"stage": 2}}),
    (whole({"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "cpu"}}),
     "zero_optimization.cpu_offload", {"zero_optimization.offload_optimizer": {"device": "cpu"}}),
    (whole({"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}}),
     "zero_optimization.cpu_offload", LEFT),
    (whole(ZERO3 | {"cpu_offload_param": True}), "zero_optimization.cpu_offload_param",
     {"zero_optimization.offload_param": {"device": "cpu"}}),
    (whole({"stage": 2, "cpu_offload_use_pin_memory": False, "offload_optimizer": {"device": "cpu"}}),
     "zero_optimization.cpu_offload_use_pin_memory", {"zero_optimization.offload_optimizer.pin_memory": False}),
    (whole(ZERO3 | {"stage3_gather_fp16_weights_on_model_save": True}),
     "zero_optimization.stage3_gather_fp16_weights_on_model_save",
     {"zero_optimization.stage3_gather_16bit_weights_on_model_save": True}),
    (whole(ZERO3 | {"prefetch_bucket_size": 7, "gather_16bit_weights_on_model_save": True}), "",
     {"zero_optimization.prefetch_bucket_size": 7}),
    (whole(ZERO3 | {"prefetch_bucket_size": "auto"}), "zero_optimization.prefetch_bucket_size",
     {"zero_optimization.stage3_prefetch_bucket_size": "auto"}),
    (whole(reduce_bucket_size=5), "reduce_bucket_size",
     {"zero_optimization.reduce_bucket_size": 5, "reduce_bucket_size": MISSING}),
    ({k: v for k, v in whole({"stage": 2, "gradient_clipping": "auto"}).items() if k != "gradient_clipping"},
     "zero_optimization.gradient_clipping", {"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}),
    (whole({"stage": 2, "device": "cpu"}), "zero_optimization.device", LEFT),
    (whole(bf16={"enabled": "auto", "loss_scale": 0, "hysteresis": 2}), "bf16.hysteresis",
     {"bf16": {"enabled": "auto"}}),
    (whole(fp16={"enabled": "auto", "min_loss_scale": 0.5}), "fp16.min_loss_scale", {"fp16.min_loss_scale": 1}),
    (whole(fp16={"enabled": "auto", "loss_scale_window": 0}), "fp16.loss_scale_window",
     {"fp16.loss_scale_window": 1}),
    (whole(fp16={"enabled": "auto", "loss_scale": 128, "min_loss_scale": 0}), "", {"fp16.min_loss_scale": 0}),
    (whole(_comment="mine"), "", {"_comment": "mine"}),
    (whole(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto",
                                                    "last_batch_iteration": -1}}), "",
     {"scheduler.params.last_batch_iteration": -1}),
    (whole(ZERO3 | {"stage3_prefetch_bucket_size": 15099494.4}), "zero_optimization.stage3_prefetch_bucket_size",
     {"zero_optimization.stage3_prefetch_bucket_size": 15099494}),
    (whole(ZERO3 | {"stage3_prefetch_bucket_size": 0.9}), "zero_optimization.stage3_prefetch_bucket_size",
     {"zero_optimization.stage3_prefetch_bucket_size": "auto"}),
    (whole({"stage": 2, "overlap_com": True}), "zero_optimization.overlap_com",
     {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
    (whole({"stage": 2, "overlap_comm": "auto"}), "zero_optimization.overlap_comm",
     {"zero_optimization": {"stage": 2}}),
    (whole({"stage": 2, "overlap_comm": "true"}), "zero_optimization.overlap_comm",
     {"zero_optimization.overlap_comm": True}),
    (whole({"stage": 2, "offload_param": {"device": "cpu"}}), "zero_optimization.offload_param",
     {"zero_optimization": {"stage": 2}}),
    (whole({"stage": 2, "offload_optimizer": "cpu"}), "zero_optimization.offload_optimizer",
     {"zero_optimization.offload_optimizer": {"device": "cpu"}}),
    (whole({"stage": 2, "offload_optimizer": {"device": "nvme"}}), "zero_optimization.offload_optimizer.device", LEFT),
    (whole({"stage": 7}), "zero_optimization.stage", LEFT),
    (whole(ZERO3 | {"elastic_checkpoint": True}), "zero_optimization.elastic_checkpoint",
     {"zero_optimization": ZERO3}),
    (whole(ZERO3 | {"mics_shard_size": -1}), "zero_optimization.mics_shard_size", {"zero_optimization": ZERO3}),
    (whole(ZERO3 | {"mics_shard_size": 8}), "zero_optimization.mics_shard_size", LEFT),
    (whole(amp={"enabled": True, "opt_level": "O2"}), "amp", {"amp": MISSING}),
    (whole(elasticity={"enabled": False}), "elasticity", {"elasticity": MISSING}),
    (whole(elasticity={"enabled": True, "version": 0.2}), "elasticity", LEFT),
    (whole(steps_per_print="auto"), "steps_per_print", {"steps_per_print": MISSING}),
    (whole(steps_per_print="100"), "steps_per_print", {"steps_per_print": 100}),
    (whole(wall_clock_breakdown=0), "wall_clock_breakdown", {"wall_clock_breakdown": False}),
    (whole(communication_data_type="bfloat16"), "communication_data_type", {"communication_data_type": "bf16"}),
    (whole(gradient_clipping=None), "gradient_clipping", {"gradient_clipping": "auto"}),
    (whole(gradient_clipping=0.3), "gradient_clipping", {"gradient_clipping": "auto"}),
    (whole(bf16=True), "bf16", {"bf16.enabled": "auto"}),
    (whole(fp16={"loss_scale": 0}), "fp16.enabled", {"fp16": {"loss_scale": 0, "enabled": "auto"}}),
    (whole(fp16={"enabled": True}, bf16={"enabled": True}), "fp16.enabled",
     {"fp16.enabled": "auto", "bf16.enabled": "auto"}),
    (whole(my_own=1), "my_own", LEFT),
    (whole(csv_monitor={"enabled": True, "output_path": "auto"}), "csv_monitor.output_path",
     {"csv_monitor": {"enabled": True}}),
    (whole(optimizer={"type": "AdamW", "params": {"lr": 1e-3}}), "optimizer", {"optimizer": MISSING}),
    (whole(optimizer={"type": "Adam", "params": {"lr": "auto", "adam_w_mode": False}}), "",
     {"optimizer.type": "Adam"}),
    (whole(optimizer={"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False}}), "optimizer.params.lr",
     {"optimizer.params.lr": "auto", "optimizer.params.adam_w_mode": False}),
    (whole(optimizer={"type": "Lion", "params": {"weight_decay": 0.1}}), "optimizer.params.lr",
     {"optimizer.params.lr": "auto", "optimizer.params.weight_decay": "auto"}),
    (whole(optimizer={"type": "OneBitAdam", "params": {"lr": "auto"}}), "optimizer.type", LEFT),
    (whole(optimizer={"type": "Adam", "params": {"lr": "auto", "max_grad_norm": 0.3, "amsgrad": True}}),
     "optimizer.params.max_grad_norm", {"optimizer.params": {"lr": "auto", "amsgrad": True}}),
    (whole(optimizer={"type": "SGD", "params": {"lr": "auto", "momentum": "auto"}}), "optimizer.params.momentum",
     {"optimizer.params": {"lr": "auto"}}),
    (whole(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}), "scheduler.params.warmup_num_steps",
     {"scheduler.params.warmup_num_steps": "auto", "scheduler.params.warmup_max_lr": "auto"}),
    (whole(scheduler={"type": "WarmupDecayLR"}), "scheduler.params", {"scheduler.params.total_num_steps": "auto"}),
    (whole(scheduler={"type": "warmuplr", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}),
     "scheduler.type", {"scheduler.type": "WarmupLR"}),
    (whole(tensor_parallel={"autotp_size": 2, "dtype": "bf16"}), "tensor_parallel.dtype",
     {"tensor_parallel": {"autotp_size": 2}}),
    ({**AUTOS}, "zero_optimization", LEFT),
    ({"zero_optimisation": {"stage": 2}, **AUTOS}, "zero_optimisation", {"zero_optimization.stage": 2}),
    *((({k: v for k, v in whole().items() if k != gone}), f"{gone}.enabled" if "16" in gone else gone,
       {gone: AUTOS[gone]}) for gone in AUTOS),
]  # fmt: skip


@pytest.mark.parametrize("tree, key, after", MENDED, ids=[f"{i}-{m[1]}" for i, m in enumerate(MENDED)])
def test_one_fault(tree: dict[str, Any], key: str, after: Any) -> None:
    found = find_faults(json.dumps(tree, indent=2))
    assert not key or key in [f.key for f in found]
    got, did, left = mended(tree)
    if after == LEFT:
        assert key in left
        assert value_at(got, key) == value_at(tree, key)
        return
    assert left == [] and (did or not key)
    for name, value in after.items():
        holder, _, last = name.rpartition(".")
        block = value_at(got, holder) if holder else got
        assert block.get(last, MISSING) == value, got


@pytest.mark.parametrize("on, off", [("fp16", "bf16"), ("bf16", "fp16")])
def test_the_other_precision_need_not_stand_there(on: str, off: str) -> None:
    """As in most public files: the one that is on says that the other is off."""
    tree = {k: v for k, v in whole(**{on: {"enabled": True}}).items() if k != off}
    assert [(f.key, f.severity) for f in find_faults(json.dumps(tree))] == [(f"{on}.enabled", "warn")]


@pytest.mark.parametrize("name", fields.RENAMED["deepspeed"])
def test_other_names_of_keys_are_no_traceback(name: str) -> None:
    for value in ("auto", 1, True, {"enabled": True}, {"stage": 1}):
        assert mended(whole(**{name: value}))


def test_keys_that_are_given_twice() -> None:
    text = '{\n  "steps_per_print": 5,\n' + json.dumps(whole(steps_per_print=5))[1:]
    assert [(f.rule, f.line) for f in find_faults(text)] == [("doubled", 3)]
    assert mended(text)[0]["steps_per_print"] == 5
    text = text.replace('"steps_per_print": 5', '"steps_per_print": 6', 1)
    assert mended(text)[2] == ["steps_per_print"]  # two values: that is the user's to decide


def test_a_key_with_dots_and_odd_places() -> None:
    [found] = find_faults(json.dumps(whole(**{"zero_optimization.stage": 3}), indent=2))
    assert found.path == ("zero_optimization.stage",) and found.line > 1
    with pytest.raises(KitError, match="nested too deeply"):
        find_faults('{"a":' * 2_000 + "1" + "}" * 2_000)
    for text in ("", "[]", '{"a": 1,}', '{"a": NaN}', '{"a": ' + "9" * 5000 + "}"):
        with pytest.raises(KitError):
            find_faults(text)


# --- the text is otherwise as it was ---------------------------------------------------------------------------------

HAND = """{
    "zero_optimization" : {"stage":2, "reduce_bucket_size": 5e8,   "allgather_bucket_size": 2E8},
    "train_batch_size": 64,
\t"fp16": {
        "enabled": "auto",
        "initial_scale_power": 16
    },   "steps_per_print": 1e2
}
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_untouched_values_stay_as_they_were_written(end: str) -> None:
    text = HAND.replace("\n", end)
    after, _ = fixes.apply_fixes(text, find_faults)
    assert "\n" not in after.replace(end, "")
    lines = after.split(end)
    before = text.split(end)
    assert lines[:2] == before[:2] and lines[3:6] == before[3:6]
    assert lines[2] == '    "train_batch_size": "auto",'
    assert '"steps_per_print": 1e2, "train_micro_batch_size_per_gpu": "auto"' in after
    assert list(json.loads(after))[:4] == list(json.loads(text))


@pytest.mark.parametrize(
    "text, edit, after",
    [
        ("{}", ("add", ("a",), 1), '{\n  "a": 1\n}'),
        ('{"a": 1}', ("add", ("b",), {"c": 2}), '{"a": 1, "b": {"c": 2}}'),
        ('{\n "a": {}\n}', ("add", ("a", "b"), 1), '{\n "a": {\n  "b": 1\n }\n}'),
        ('{\n "a": {\n  "b": 1\n }\n}', ("add", ("a", "c"), {"d": 1}),
         '{\n "a": {\n  "b": 1,\n  "c": {\n   "d": 1\n  }\n }\n}'),
        ('{"a": 1, "b": 2, "c": 3}', ("remove", ("a",)), '{"b": 2, "c": 3}'),
        ('{"a": 1, "b": 2, "c": 3}', ("remove", ("b",)), '{"a": 1, "c": 3}'),
        ('{"a": 1, "b": 2, "c": 3}', ("remove", ("c",)), '{"a": 1, "b": 2}'),
        ('{ "a": 1 }', ("remove", ("a",)), "{}"),
        ('{"a": 1e5, "a": 1e5}', ("remove-first", ("a",)), '{"a": 1e5}'),
        ('{"a" : [1, 2]}', ("rename", ("a",), "é"), '{"é" : [1, 2]}'),
        ('{"a" : [1, 2] }', ("replace", ("a",), "auto"), '{"a" : "auto" }'),
    ],
)  # fmt: skip
def test_edits(text: str, edit: tuple[Any, ...], after: str) -> None:
    assert fixes.apply_edit(text, fixes.Edit(*edit)) == after


# --- mutated files -----------------------------------------------------------------------------------------------

BASES = [*source_ds.FILES.values(), *(json.loads(f.read_text()) for f in OURS)]
NAMES = sorted({k for t, table in fields.field_tables().items() if t.startswith("deepspeed") for k in table})
TOP = list(fields.field_tables()["deepspeed"])
SOME: list[Any] = [
    None, True, False, 0, 1, -1, 7, 10**10, 0.9, 5e8, "auto", "true", "cpu", "5e8", "bf16", "", {}, [1, "auto"],
    {"enabled": "auto"}, {"enabled": True}, {"device": "cpu"}, {"stage": 2}, {"x": 1}, {"type": "WarmupLR"},
]  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**10), st.floats(-1e10, 1e10), st.sampled_from(
        ["auto", "true", "cpu", "5e8", "1", "bf16", "", "AdamW", "é\n"]), st.just({}), st.just([1, "auto"]),
    st.dictionaries(
        st.sampled_from(["enabled", "device", "stage", "lr", "x"]), st.sampled_from(["auto", True, 1, "cpu"])),
)  # fmt: skip


def blocks(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [tree, *(b for v in tree.values() if isinstance(v, dict) for b in blocks(v))]


def mutate(draw: random.Random, value: Any) -> dict[str, Any]:
    """One of the files with 1 to 4 faults: another value, a key less, a letter less. `value()`: a value."""
    tree = copy.deepcopy(draw.choice(BASES))
    for _ in range(draw.randint(1, 4)):
        block = draw.choice(blocks(tree))
        key = draw.choice([*block, draw.choice(NAMES), draw.choice(TOP), "my.key"])
        how = draw.choice(["value", "value", "drop", "spell"])
        if how == "value":
            block[key] = copy.deepcopy(value())
        elif how == "drop":
            block.pop(key, None)
        elif key in block and key:
            at = draw.randrange(len(key))
            block[key[:at] + key[at + 1 :]] = block.pop(key)
    return tree


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_mutated_files_are_mended_once_and_for_all(seed: int, data: st.DataObject) -> None:
    """Never another exception; what is mended stays mended; every untouched value of the file is still there."""
    draw = random.Random(seed)
    tree = mutate(draw, lambda: data.draw(VALUES))
    text = json.dumps(tree, indent=draw.choice([None, 1, 4]))
    found = find_faults(text)
    assert all(f.problem and f.fix and f.line >= 1 for f in found)
    got, did, left = mended(text)
    touched = " ".join(did)
    for key, value in tree.items():
        if not re.search(rf"(^|[ ;]){re.escape(key)}[. :]", touched + " "):
            assert got.get(key) == value, (key, did)
    if not did:
        assert got == tree


def test_deepspeed_itself_reads_what_is_left_without_fault() -> None:
    """Mended files in which nothing is left, resolved and read by the installed DeepSpeed: no false "valid"."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    read = 0
    for seed in range(400):
        draw = random.Random(seed)
        tree, _, left = mended(mutate(draw, partial(draw.choice, SOME)))
        if not left:
            for precision in ("float32", "float16", "bfloat16"):
                settled = resolve_deepspeed_json(
                    tree, trainer={"max_steps": 10}, world_size=1, hidden_size=64, precision=precision
                )
                DeepSpeedConfig(settled)
            read += 1
    assert read > 100


@pytest.mark.parametrize("tree, key, after", MENDED, ids=[f"{i}-{m[1]}" for i, m in enumerate(MENDED)])
def test_deepspeed_reads_every_fix(tree: dict[str, Any], key: str, after: Any) -> None:
    """With fp16, bfloat16 and neither, whichever the trainer's "auto" becomes."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    got, _, left = mended(tree)
    for precision in () if left else ("float32", "float16", "bfloat16"):
        trainer = {"max_steps": 10, "learning_rate": 1e-4, "warmup_steps": 2}
        DeepSpeedConfig(
            resolve_deepspeed_json(got, trainer=trainer, world_size=1, hidden_size=64, precision=precision)
        )


@pytest.mark.parametrize("block", ["bf16", "fp16", "zero_optimization", ""])
def test_a_key_in_another_block_is_placed(block: str) -> None:
    """Up or down: the block that has the key is named."""
    for name, places in fields.deepspeed_places().items():
        place = fields.place_of_key(name)
        if place is None or block in [p for p, _ in places] or name in ("enabled", "stage"):
            continue
        tree = whole()
        (tree[block] if block else tree)[name] = "auto"
        if name in fields.RENAMED["deepspeed"] and not block:
            continue
        [found] = [f for f in find_faults(json.dumps(tree)) if f.path == tuple(filter(None, (block, name)))]
        assert (place[0] or "top level") in found.fix or "no loss scaling" in found.fix, found


@pytest.mark.parametrize("file", OURS, ids=lambda f: f.stem)
def test_what_auto_becomes_is_what_deepspeed_gets(file: Path) -> None:
    """The values that are shown for a run are those of resolve_deepspeed_json, which the ranks use."""
    text, tree = file.read_text(), load_deepspeed_file(file)
    setting = RunSettings(64, {"per_device_train_batch_size": 3, "max_grad_norm": 0.3}, 2, "bfloat16")
    out, against = fill_for_run(tree, setting)
    given = resolve_deepspeed_json(tree, trainer=setting.trainer, world_size=2, hidden_size=64, precision="bfloat16")
    rows = describe_autos(tree, text, setting, out, against)
    assert len(rows) == text.count('"auto"') and against == []
    assert [r["becomes"] for r in rows] == [value_at(given, r["key"]) for r in rows]
    assert [r["line"] for r in rows] == [n for n, line in enumerate(text.splitlines(), 1) if '"auto"' in line]


def test_the_scanner_reads_what_json_reads() -> None:
    for tree in BASES:
        for indent in (None, 2):
            assert json_edit.parse_nodes(json.dumps(tree, indent=indent)).value == tree


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    source_ds.write_all(tmp_path)
    return tmp_path


def test_the_file_alone(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_verb(["check", "--deepspeed", "catalogue_zero1.json"]) == REFUSED
    out, err = capsys.readouterr()
    assert (
        "where: catalogue_zero1.json:5: zero_optimization.cpu_offload" in err
        and err.startswith("refused: zero_optimization.cpu_offload is an old name")
        and "note: bf16.enabled is missing" in err
    )
    assert "fp16.enabled: auto -> the trainer's fp16" in out
    assert cli.run_verb(["check", "--deepspeed", "catalogue_zero3.json"]) == DONE
    out, err = capsys.readouterr()
    assert "auto -> hidden_size x hidden_size: needs the model" in out and "note: the optimizer block" in err
    assert cli.run_verb(["check", "--deepspeed", "nothing.json"]) == REFUSED


SIZES = {
    "zero_optimization.reduce_bucket_size": 4096 * 4096,
    "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * 4096 * 4096),
    "zero_optimization.stage3_param_persistence_threshold": 40960,
}


@pytest.mark.parametrize("how", ["preset", "folder"])
def test_the_sizes_for_a_model(files: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    (files / "model").mkdir()
    shape = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 32}
    (files / "model" / "config.json").write_text(json.dumps(shape | {"intermediate_size": 64, "vocab_size": 99}))
    model = ["model=llama3_1_8b"] if how == "preset" else ["--model", "model"]
    assert cli.run_verb(["check", "--deepspeed", "catalogue_zero3.json", *model, "--json"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    becomes = {r["key"]: r["becomes"] for r in answer["auto"]}
    assert {k: becomes[k] for k in SIZES} == SIZES
    assert becomes["optimizer.params.lr"] is None  # that is the trainer's, and no run is named


def test_against_a_run(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The doctor's file fits the run that it was written for; with other values each difference is named."""
    run = ["check", "--deepspeed", "doctor_zero2.json", "recipe=llama2_7b_lora_zero2_doctor", "--json"]
    assert cli.run_verb([*run, "launch.num_gpus=2", "trainer.learning_rate=1.0e-4"]) == REFUSED
    problems = {p["key"]: p for p in json.loads(capsys.readouterr().out)["problems"]}
    assert problems["train_batch_size"]["severity"] == "refuse" and "32" in problems["train_batch_size"]["problem"]
    assert "trainer.learning_rate makes it 0.0001" in problems["optimizer.params.lr"]["problem"]
    assert problems["train_micro_batch_size_per_gpu"]["severity"] == "warn"
    assert cli.run_verb([*run, "launch.num_gpus=4"]) == REFUSED
    problems = {p["key"]: p for p in json.loads(capsys.readouterr().out)["problems"]}
    assert problems["train_batch_size"]["severity"] == "warn"
    assert cli.run_verb([*run, "--fix"]) == DONE
    fixed = json.loads(capsys.readouterr().out)
    assert fixed["remaining"] == [] and fixed["written"] == "doctor_zero2.fixed.json"
    assert cli.run_verb([*run, "deepspeed.zero_optimization.stage=3"]) == REFUSED
    assert "change the file itself" in capsys.readouterr().out
    assert cli.run_verb([*run[:3], "doctor_zero2.fixed.json", *run[4:], "trainer.lerning_rate=1"]) == REFUSED


def test_fix_writes_beside_and_never_over(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (files / "doctor_zero2.json").read_text()
    assert cli.run_verb(["check", "--deepspeed", "doctor_zero2.json", "--fix"]) == DONE
    out = capsys.readouterr().out
    assert "written    doctor_zero2.fixed.json" in out and "train_batch_size set" in out
    assert "then:  give the trainer per_device_train_batch_size=16" in out
    assert (files / "doctor_zero2.json").read_text() == before
    assert cli.run_verb(["check", "--deepspeed", "doctor_zero2.fixed.json"]) == DONE
    assert capsys.readouterr().out.endswith("valid\n")
    assert cli.run_verb(["check", "--deepspeed", "doctor_zero2.json", "--fix"]) == REFUSED
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run_verb(["check", "--deepspeed", "doctor_zero2.json", "--fix", "other.json"]) == DONE
    assert (
        cli.run_verb(["check", "--deepspeed", "doctor_zero2.json", "--fix", "doctor_zero2.json", "--overwrite"])
        == DONE
    )
    assert (
        cli.run_verb(["check", "--deepspeed", "doctor_zero2.json", "--fix"]) == DONE
    )  # nothing left to mend or write
    assert "nothing to mend" in capsys.readouterr().out
    assert cli.run_verb(["check", "--deepspeed", "catalogue_zero1.json", "--fix", "no/such/folder.json"]) != DONE


def test_the_problems_of_a_broken_file_as_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "broken.json").write_text('{\n  "a": 1,\n}')
    assert cli.run_verb(["check", "--deepspeed", "broken.json", "--json"]) == REFUSED
    answer = json.loads(capsys.readouterr().out)
    assert answer["valid"] is False and "line 2" in answer["problems"][0]["where"] + "line 2"
    (files / "left.json").write_text(json.dumps(whole(my_own=1)))
    assert cli.run_verb(["check", "--deepspeed", "left.json", "--fix"]) == REFUSED
    assert "nothing to mend" in capsys.readouterr().out
