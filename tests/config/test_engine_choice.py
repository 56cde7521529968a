"""deepspeed=auto: the fastest engine that the forecast finds to fit this machine's GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import api
from kit.config.engine_choice import COSTS
from kit.errors import KitError
from kit.schema.run_plan import RunPlan
from kit.system import hardware, paths

FULL, LARGE, FSDP = "peft=none", "model=llama3_1_70b", "++fsdp.reshard_after_forward=true"


@pytest.fixture
def plan_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunPlan]:
    """Compose a run for so many GPUs of so many GiB; 0: they are on another machine."""

    def compose(count: int, gigabytes: float, *words: str) -> RunPlan:
        gpus = tuple(hardware.Gpu("GPU", gigabytes, (9, 0)) for _ in range(count if gigabytes else 0))
        monkeypatch.setattr(hardware, "list_gpus", lambda: gpus)
        stock = ["dataset.path=trl-lib/Capybara", "trainer.max_length=4096", f"launch.num_gpus={count}"]
        model = [] if any(word.startswith("model=") for word in words) else ["model=llama3_1_8b"]
        return api.compose(*stock, *model, "deepspeed=auto", *words)

    return compose


def engine(plan: RunPlan) -> str:
    zero: dict[str, Any] = (plan.deepspeed or {}).get("zero_optimization") or {}
    offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    return f"zero{zero['stage']}{'_offload' * offload}" if zero else "none"


@pytest.mark.parametrize("count, gigabytes, words, chosen", [
    (1, 139, [], "none"), (1, 24, [], "none"), (1, 140, [FULL], "zero3"), (1, 80, [FULL], "zero2_offload"),
    (1, 24, [FULL], "zero2_offload"), (2, 80, [], "zero2"), (2, 24, [], "zero2"), (8, 80, [FULL], "zero2"),
    (2, 80, [FULL], "zero3"), (8, 32, [FULL], "zero3"), (8, 139, [LARGE], "zero3"), (8, 80, [LARGE], "zero3"),
])  # fmt: skip
def test_the_fastest_that_fits(plan_on, count: int, gigabytes: float, words: list[str], chosen: str):
    plan = plan_on(count, gigabytes, *words)
    assert engine(plan) == chosen, plan.notes[0]
    assert plan.notes[0].startswith(f"deepspeed=auto: {chosen}, ") and "auto" not in str(plan.deepspeed)
    assert plan.memory and plan.memory.options[0].bytes < gigabytes * 2**30
    assert plan.launch.launcher == ("deepspeed" if count > 1 else "local")


def test_it_is_the_run_that_names_the_engine(plan_on, monkeypatch: pytest.MonkeyPatch):
    """The same plan: name, JSON, memory and where each key comes from."""
    auto = plan_on(2, 80, FULL)
    words = ["dataset.path=trl-lib/Capybara", "trainer.max_length=4096", "launch.num_gpus=2", "model=llama3_1_8b"]
    named = api.compose(*words, "deepspeed=zero3", FULL)
    different = {"notes", "overrides", "composed"}
    assert auto.model_dump(exclude=different) == named.model_dump(exclude=different)
    assert auto.composed["deepspeed"] == named.composed["deepspeed"]


def test_keys_on_top_stay(plan_on):
    plan = plan_on(2, 24, "deepspeed.zero_optimization.reduce_bucket_size=12345678")
    assert engine(plan) == "zero2" and plan.deepspeed["zero_optimization"]["reduce_bucket_size"] == 12345678


def test_an_engine_that_a_rule_refuses_is_left_out(plan_on):
    """LoMo steps within the backward, which DeepSpeed has its own of: no engine is left."""
    with pytest.raises(KitError, match="lomo"):
        plan_on(2, 24, FULL, "trainer.optim=lomo")


def test_more_than_there_is(plan_on):
    plan = plan_on(2, 8, LARGE, FULL)
    assert "the forecast is more than there is" in plan.notes[0] and engine(plan) == "zero3_offload"


@pytest.mark.parametrize("count, gigabytes, words, said", [
    (2, 0, [], "are not on this machine"), (2, 80, [FSDP], "they shard the same weights"),
    (1, 80, ["peft.peft_type=IA3"], "knows too little"), (1, 80, ["++deepspeed.file=x.json"], "both name the JSON"),
])  # fmt: skip
def test_what_cannot_be_chosen(plan_on, count: int, gigabytes: float, words: list[str], said: str):
    with pytest.raises(KitError) as refused:
        plan_on(count, gigabytes, *words)
    assert said in str(refused.value) and all(p.fix for p in refused.value.problems)


def test_each_engine_is_a_file():
    assert all((paths.DS_CONFIGS / f"{name}.json").is_file() for name in COSTS if name != "none")
