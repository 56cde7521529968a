"""Which attention a plan names, and that a run keeps it."""

from __future__ import annotations

import pytest
from soak import make_inputs

from kit import api
from kit.inspection.attention import ATTENTION
from kit.models.load import base_load_arguments
from kit.schema.run_plan import RunPlan
from kit.storage import run_directory
from launch import harness


@pytest.mark.parametrize("given, chosen", [
    ([], ATTENTION),
    (["model.attn_implementation=auto"], ATTENTION),
    (["model.attn_implementation=sdpa"], "sdpa"),
    (["model.attn_implementation=null"], None),
    (["trainer.model_init_kwargs={attn_implementation: eager}"], None),
    (["trainer.torch_compile=true"], None),
])  # fmt: skip
def test_the_users_choice_is_honoured(given, chosen, tmp_path):
    plan = api.compose(*make_inputs(tmp_path), *given)
    assert plan.model.attn_implementation == chosen
    asked = "eager" if "trainer.model_init_kwargs" in str(given) else chosen
    assert base_load_arguments(plan).get("attn_implementation") == asked


def test_it_is_no_part_of_the_name(tmp_path):
    stock = make_inputs(tmp_path)
    assert api.compose(*stock).hash == api.compose(*stock, "model.attn_implementation=eager").hash


@pytest.mark.parametrize("started_with", [None, "eager", ATTENTION])
def test_a_resume_keeps_what_the_run_began_with(started_with, tmp_path):
    """Plans of before this choice hold null, and go on with it."""
    plan = api.compose(*make_inputs(tmp_path))
    values = plan.model_dump(mode="json")
    values["model"]["attn_implementation"] = started_with
    plan = RunPlan.model_validate(values)
    longer = api.override_plan(plan, ["trainer.max_steps=50"])
    assert longer.model.attn_implementation == started_with and longer.trainer["max_steps"] == 50
    assert api.override_plan(plan, ["model.attn_implementation=sdpa"]).model.attn_implementation == "sdpa"


def test_lengths_keep_documents_apart_where_a_mask_does_not(tmp_path):
    """OPT makes its mask without positions: packed, it is warned of with sdpa, and not with sdpa_varlen."""
    stock = [o for o in make_inputs(tmp_path) if not o.startswith("model.name_or_path")]
    stock += ["model=opt_6b7", "trainer.packing=true"]
    rules = {name: {w["rule"] for w in api.compose(*stock, f"model.attn_implementation={name}", here=False).warnings}
             for name in ("auto", "sdpa")}  # fmt: skip
    assert "packing-recurrent" not in rules["auto"] and "packing-recurrent" in rules["sdpa"]


def test_a_packed_run_trains_with_it(base, chat, tmp_path, capfd, monkeypatch):
    """Its losses are those of eager attention; its first lines name the kernels."""
    from kit.training.run import train

    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    losses = {}
    for name in (ATTENTION, "eager"):
        more = ("trainer.packing=true", "trainer.max_steps=3", "trainer.max_length=64", "launch=local")
        given = harness.overrides(base, chat, tmp_path / name, *more, f"model.attn_implementation={name}")
        run = run_directory.create_run_directory(api.compose(*given))
        assert train(run) == 0
        losses[name] = list(harness.rows(run.run_path).values())
    assert losses[ATTENTION] == pytest.approx(losses["eager"], abs=1e-5) and len(losses["eager"]) == 3
    assert f"attention {ATTENTION}: full rows by torch's choice, packed documents by sdpa" in capfd.readouterr().out
