"""One key of a valid run changed: refused by name, or honoured, which means found in what the worker hands over.

The objects of the libraries are built for real, so that nothing the checks let through is refused by them later.
`soak.py --only honour` does the same many times.
"""

from __future__ import annotations

import random
from pathlib import Path

import mutate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.config.compose import Composed, compose

GOOD = ("refused", "honoured")


@pytest.fixture(scope="module")
def runs(base: Path, chat: Path) -> list[Composed]:
    return mutate.valid_runs(base, chat)


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(which=st.integers(0, 10**6), seed=st.integers(0, 2**32))
def test_a_change_is_refused_by_name_or_honoured(which: int, seed: int, runs: list[Composed]):
    run = runs[which % len(runs)]
    key, value = mutate.mutation(random.Random(seed), run.tree)
    verdict, details = mutate.judge(run, key, value)
    assert verdict in GOOD, f"{verdict}: {key}={value!r}\n{details}"


@pytest.mark.parametrize(
    "key, value, verdict",
    [
        ("trainer.learning_rate", 3e-4, "honoured"), ("trainer.lerning_rate", 3e-4, "refused"),
        ("peft.r", 4, "honoured"), ("model.attn_implementation", "eager", "honoured"),
        ("trainer.ddp_backend", "nccl", "refused"), ("trainer.model_init_kwargs", "1", "refused"),
        ("trainer.accelerator_config", {"a": 1}, "refused"), ("trainer.debug", "word", "refused"),
        ("trainer.accelerator_config", {"even_batches": False}, "honoured"), ("peft.peft_type", None, "refused"),
        ("peft.layers_to_transform", 0, "refused"), ("peft.layers_pattern", "", "refused"),
        ("trainer.lr_scheduler_kwargs", "1", "refused"), ("trainer.weight_decay", -1, "refused"),
        ("dataset.streaming", True, "refused"),
    ],
)  # fmt: skip
def test_found_by_mutating(key, value, verdict, runs):
    """The plainest of each kind, and what mutations once brought to light."""
    assert mutate.judge(runs[0], key, value)[0] == verdict


def test_permission_for_foreign_optimizers(base, chat, runs):
    run = next(r for r in runs if r.tree["deepspeed"])
    assert mutate.judge(run, "deepspeed.zero_allow_untested_optimizer", False)[0] == "refused"


def test_what_is_not_handed_over_is_noticed(runs, monkeypatch: pytest.MonkeyPatch):
    """The judge itself: a worker that drops, renames or overwrites a value does not pass."""
    import kit.training.run as worker

    honest = worker.sft_config_arguments
    monkeypatch.setattr(worker, "sft_config_arguments", lambda plan: {**honest(plan), "learning_rate": 1e-5})
    assert mutate.judge(runs[0], "trainer.learning_rate", 3e-4)[0] == "lost"
    monkeypatch.setattr(worker, "sft_config_arguments", lambda plan: {**honest(plan), "lerning_rate": 1})
    assert mutate.judge(runs[0], "trainer.learning_rate", 3e-4)[0] == "late"


def test_both_verdicts_are_common(runs):
    seen = [mutate.judge(runs[0], *mutate.mutation(random.Random(n), runs[0].tree))[0] for n in range(100)]
    assert seen.count("refused") > 30 and seen.count("honoured") > 10


def test_a_change_stands_where_the_command_line_would_put_it(base, chat):
    whole = [f"model.name_or_path={base}", f"dataset.path={chat}", "peft.r=4"]
    assert mutate.changed(compose(whole[:2]), "peft.r", 4).tree == compose(whole).tree
