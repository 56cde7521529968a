"""A run that the forecast finds too large for its GPUs: refused where it starts, warned of elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kit import api
from kit.cli import verbs as cli
from kit.config.memory_check import KEY, RULE
from kit.errors import DONE, KitError
from kit.forecast.memory import CONTEXT_BYTES, FORECAST_ERROR
from kit.schema.run_plan import RunPlan
from kit.system import hardware

LARGE = ("model=llama3_1_8b", "dataset.path=trl-lib/Capybara", "launch.num_gpus=1", "trainer.max_length=4096",
         "trainer.per_device_train_batch_size=4", "trainer.activation_checkpointing=false")  # fmt: skip


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Give this machine one GPU of so many bytes, or none."""

    def give(size: float) -> None:
        gpus = (hardware.Gpu("Small GPU", size / 2**30, (9, 0)),) if size else ()
        monkeypatch.setattr(hardware, "list_gpus", lambda: gpus)

    return give


def compose(base: Path, chat: Path, *words: str) -> RunPlan:
    stock = (f"model.name_or_path={base}", f"dataset.path={chat}", "trainer.bf16=true", "trainer.max_length=64")
    return api.compose(*stock, *words, here=True)


def test_refused_where_it_starts(gpu_of, base: Path, chat: Path) -> None:
    gpu_of(CONTEXT_BYTES / 2)
    with pytest.raises(KitError, match="Small GPU has 0.3") as refused:
        compose(base, chat)
    [problem] = refused.value.problems
    assert problem.rule == RULE and KEY in problem.fix
    plan = compose(base, chat, f"{KEY}=true")
    assert [w["rule"] for w in plan.warnings].count(RULE) == 1
    assert compose(base, chat, "trainer.use_cpu=true", "trainer.bf16=false").world_size == 1  # a CPU is not forecast
    gpu_of(24e9)
    assert RULE not in [w["rule"] for w in compose(base, chat).warnings]


def test_the_error_of_the_forecast_is_left_to_the_trial_step(gpu_of) -> None:
    """A GPU a little too small for the forecast starts the run, one that is too small for the error too does not."""

    def warned() -> bool:
        return RULE in [w["rule"] for w in api.compose(*LARGE, here=False).warnings]

    gpu_of(139 * 2**30)
    assert not warned()
    from kit.forecast.of_plan import forecast_plan
    from kit.inspection.model import inspect_model

    plan = api.compose(*LARGE, here=False)
    memory = forecast_plan(plan, inspect_model(plan.model, here=False)[0].text)
    assert memory
    least = memory.peak * (1 - FORECAST_ERROR) + CONTEXT_BYTES
    for size, want in ((least * 1.01, False), (least * 0.99, True)):
        gpu_of(size)
        assert warned() is want


@pytest.mark.parametrize("size, said", [(0, "no GPU is here"), (139 * 2**30, "Small GPU's 149.3 GB")])
def test_check_names_the_figure(gpu_of, capsys: pytest.CaptureFixture[str], size: float, said: str) -> None:
    gpu_of(size)
    assert cli.run_verb(["check", *LARGE]) == DONE
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    assert said in line and "activation checkpointing off" in line and "GB" in line
