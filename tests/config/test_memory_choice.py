"""What is kept for the backward pass and how many rows are computed at once, chosen from a forecast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import api
from kit.config import memory_choice
from kit.errors import KitError
from kit.schema.run_plan import MemoryOption, RunPlan, load_plan
from kit.storage import run_directory
from kit.system import hardware

ROWS = "per_device_train_batch_size"


@pytest.fixture
def plan_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    """Compose a run for so many GPUs of so many GiB; 0: they are on another machine."""

    def compose(gigabytes: float, *overrides: str, count: int = 1) -> RunPlan:
        gpus = tuple(hardware.Gpu("GPU", gigabytes, (9, 0)) for _ in range(count if gigabytes else 0))
        monkeypatch.setattr(hardware, "list_gpus", lambda: gpus)
        stock = ["dataset.path=trl-lib/Capybara", "trainer.max_length=4096", f"launch.num_gpus={count}"]
        return api.compose(*stock, *([] if any(o.startswith("model") for o in overrides) else ["model=llama3_1_8b"]),
                           *overrides)  # fmt: skip

    return compose


def level(plan: RunPlan) -> str | int:
    t = plan.trainer
    if not t["activation_checkpointing"]:
        return "none"
    kwargs = t.get("activation_checkpointing_kwargs") or {}
    return "selective" if kwargs.get("selective") else kwargs.get("every_n_layers", "all")


@pytest.mark.parametrize(
    "gigabytes, overrides, want",
    [
        (139, [], "none"),
        (80, [], "none"),
        (40, [], "selective"),
        (24, [], "all"),
        (24, ["quantization=nf4"], "selective"),
        (16, ["quantization=nf4", "trainer.max_length=8192"], "all"),
        (139, ["peft=none"], "none"),
        (80, ["model=qwen3_1b7", "peft=none"], "none"),
    ],
)
def test_less_memory_more_recomputation(plan_on, gigabytes: float, overrides: list[str], want: str):
    plan = plan_on(gigabytes, *overrides)
    assert level(plan) == want, plan.memory
    assert plan.memory and plan.memory.options[0].bytes < gigabytes * 2**30
    assert plan.trainer[ROWS] * plan.trainer["gradient_accumulation_steps"] == 8 == plan.global_batch_size
    needed = [option.bytes for option in plan.memory.options]
    assert all(later <= memory_choice.NEXT_SHARE * earlier for earlier, later in zip(needed, needed[1:], strict=False))


def test_a_base_that_fits_in_no_way_is_said(plan_on):
    plan = plan_on(24, "model=llama3_1_70b")
    assert level(plan) == "all" and len(plan.memory.options) == 1
    assert "GPU's 25.8 GB: more than it has" in api.plan_summary(plan)["memory"]
    assert "more than" not in api.plan_summary(plan_on(80))["memory"]


def test_an_adapter_under_zero3_is_never_selective(plan_on):
    plan = plan_on(32, "deepspeed=zero3", count=2)
    assert plan.memory
    assert not any(option.activation_checkpointing_kwargs.get("selective") for option in plan.memory.options)
    kept = {key: plan.deepspeed[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")}
    assert list(kept.values()) == [plan.trainer[ROWS], plan.trainer["gradient_accumulation_steps"]]
    assert plan.deepspeed["train_batch_size"] == plan.global_batch_size == 16


@pytest.mark.parametrize(
    "overrides, rows, steps, whole",
    [
        (["trainer.per_device_train_batch_size=3"], 3, 1, 3),
        (["trainer.gradient_accumulation_steps=4"], 8, 4, 32),
        (["global_batch_size=6"], 6, 1, 6),
        (["global_batch_size=64", "trainer.gradient_accumulation_steps=16"], 4, 16, 64),
        (["global_batch_size=7"], 7, 1, 7),
        (["global_batch_size=22"], 2, 11, 22),
    ],
)
def test_what_is_given_stays(plan_on, overrides: list[str], rows: int, steps: int, whole: int):
    for gigabytes in (0, 2000):  # no GPU to choose for; one that holds everything
        plan = plan_on(gigabytes, "trainer.max_length=64", *overrides)
        found = plan.trainer[ROWS], plan.trainer["gradient_accumulation_steps"], plan.global_batch_size
        assert found == (rows, steps, whole)


@pytest.mark.parametrize(
    "override",
    ["trainer.gradient_checkpointing=true", "trainer.activation_checkpointing=true",
     "trainer.gradient_checkpointing=false", "trainer.activation_checkpointing_kwargs={every_n_layers: 2}"],
)  # fmt: skip
def test_checkpointing_of_ones_own_is_kept(plan_on, override: str):
    plan = plan_on(139, override)
    key, _, value = override.removeprefix("trainer.").partition("=")
    assert json.dumps(plan.trainer[key]) in (value, '{"every_n_layers": 2}')
    assert plan.trainer.get("activation_checkpointing") != "auto"


def test_without_a_gpu_nothing_is_chosen_and_the_name_is_the_same(plan_on):
    here, there = plan_on(0), plan_on(139)
    assert here.memory is None and here.trainer["activation_checkpointing"] is True and here.trainer[ROWS] == 8
    assert here.hash == there.hash == plan_on(24).hash
    assert plan_on(139, "trainer.gradient_checkpointing=true").hash == here.hash


def test_batches_that_do_not_divide(plan_on):
    for overrides, fix in (
        (["global_batch_size=5"], "global_batch_size=6"),
        (["global_batch_size=6", "trainer.gradient_accumulation_steps=2"], "leave out"),
    ):
        with pytest.raises(KitError) as refused:
            plan_on(80, *overrides, "deepspeed=zero2", count=2)
        assert fix in str(refused.value)


def option(size: int, cost: float) -> MemoryOption:
    return MemoryOption(activation_checkpointing=True, per_device_train_batch_size=1, gradient_accumulation_steps=1,
                        bytes=size, cost=cost)  # fmt: skip


def test_the_order_of_options():
    options = [option(100, 1.0), option(80, 1.03), option(75, 1.2), option(40, 1.5), option(39, 1.4), option(10, 3.0)]
    assert [o.bytes for o in memory_choice.order_options(options, 120)] == [80, 39, 10]
    assert [o.bytes for o in memory_choice.order_options(options, 79)] == [75, 39, 10]
    assert [o.bytes for o in memory_choice.order_options(options, 5)] == [10]  # none fits: the least


def test_a_run_that_was_made_elsewhere_is_chosen_for_where_it_starts(plan_on):
    """Every rank comes to the same values; each step down needs less, and the rows of a step stay."""
    made = plan_on(0, "deepspeed=zero2")
    assert made.memory is None
    assert memory_choice.choose_on_the_node(made) is made  # no GPU here either
    plan_on(139, "deepspeed=zero2")  # which puts one into this machine
    chosen = memory_choice.choose_on_the_node(made)
    assert chosen.memory and level(chosen) == "none" and chosen.hash == made.hash
    assert memory_choice.choose_on_the_node(chosen) is chosen
    lower, seen = chosen, []
    while lower:
        last, lower = lower, memory_choice.take_next_option(lower)
        assert last.deepspeed["train_micro_batch_size_per_gpu"] == last.trainer[ROWS]
        seen.append((level(last), last.trainer[ROWS] * last.trainer["gradient_accumulation_steps"]))
    assert len(seen) > 3 and {rows for _, rows in seen} == {8} and seen[-1][0] == "all" and last.trainer[ROWS] == 1


def test_a_resume_keeps_what_fitted(plan_on, base: Path, chat: Path, tmp_path: Path):
    words = [f"model.name_or_path={base}", f"dataset.path={chat}", f"runs_dir={tmp_path}", "deepspeed=zero2"]
    made = run_directory.create_run_directory(plan_on(80, *words))
    assert made.memory
    options = [
        option(3, 1.0),
        option(2, 2.0).model_copy(update={"activation_checkpointing_kwargs": {"selective": True}}),
    ]
    lower = memory_choice.with_option(made, made.memory.model_copy(update={"options": options, "chosen": 1}))
    run_directory.write_plan(lower)
    resumed = api.override_plan(load_plan(made.run_dir), ["trainer.max_steps=10"])
    assert resumed.memory == lower.memory and level(resumed) == "selective" and resumed.trainer["max_steps"] == 10
    assert resumed.deepspeed["train_micro_batch_size_per_gpu"] == 1
    anew = api.override_plan(load_plan(made.run_dir), ["trainer.activation_checkpointing=true"])
    assert anew.memory and anew.memory.chosen == 0 and anew.memory.options != options
