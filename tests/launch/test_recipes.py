"""Every recipe runs here: composed, trained for 5 steps on its base's tiny twin, saved, merged, reloaded.

Only the shape, the number of processes and the precision differ from what the recipe says. One process runs those for
one GPU, one `deepspeed` launch those for several; the table in recipes/README.md is what came out.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import source_data
import twins

from kit import api
from kit.launchers.command import free_port
from kit.storage import manifest
from kit.system import paths
from launch import harness

pytestmark = pytest.mark.launch
RECIPES = sorted(f.stem for f in (paths.CONF / "recipe").glob("*.yaml"))
TABLE = harness.ROOT / "recipes" / "README.md"
COLUMNS = ("checks", "plans", "trains", "merges", "reloads")
STEPS = 5


@pytest.fixture(scope="module")
def plans(tmp_path_factory, ops_dir) -> dict[str, Path]:
    """Recipe to its plan.json over the twin, nothing started yet."""
    work = tmp_path_factory.mktemp("recipes")
    files = source_data.write_all(work / "data")
    made = {}
    for name in RECIPES:
        asked = api.compose(f"recipe={name}", here=False)  # valid as it stands, on any machine
        twin = twins.make_twin(work / "twins" / name, asked.model.config, asked.tokenizer.pad_token)
        over = [
            f"recipe={name}", f"model.name_or_path={twin}", f"runs_dir={work / 'runs'}", "trainer.use_cpu=true",
            "trainer.bf16=false", "trainer.fp16=false", f"trainer.max_steps={STEPS}", "trainer.logging_steps=1",
            f"launch.num_gpus={min(asked.world_size, 2)}", "model.dtype=float32",
        ]  # fmt: skip
        if asked.dataset.path in files:
            over.append(f"dataset.path={files[asked.dataset.path]}")
        elif name == "quickstart_base":  # its data is made by the quickstart
            (work / "corpus.jsonl").write_text(json.dumps({"text": "B comes after A."}) + "\n")
            over.append(f"dataset.path={work / 'corpus.jsonl'}")
        done = harness.kit("compose", *over, cwd=work)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        made[name] = Path(json.loads(done.stdout)["plan"])
    return made


@pytest.fixture(scope="module")
def trained(plans) -> dict[str, Path]:
    """Recipe to its run directory after training: two launches in all."""
    script = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    world = {name: json.loads(plan.read_text())["world_size"] for name, plan in plans.items()}
    alone = [str(plans[n]) for n in RECIPES if world[n] == 1]
    several = [str(plans[n]) for n in RECIPES if world[n] > 1]
    work = plans[RECIPES[0]].parents[2]
    port = str(free_port())
    for argv in (
        [sys.executable, script, *alone],
        ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", port, script, *several],
    ):
        done = harness.finish(harness.start(argv, work, DS_ACCELERATOR="cpu"), 500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return {name: plan.parent for name, plan in plans.items()}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, bool]]:
    return {name: dict.fromkeys(COLUMNS, False) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_checks_plans_trains_merges_and_reloads(trained, table, name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kit.merging import merge

    found = table[name]
    found["checks"] = found["plans"] = True  # the fixture composed it as it stands and froze its twin
    run = trained[name]
    plan = json.loads((run / "plan.json").read_text())
    losses = harness.rows(run)
    assert sorted(losses) == [*range(1, STEPS + 1)] and all(math.isfinite(x) for x in losses.values())
    assert len(set(losses.values())) > 1
    saved = run / ("adapter" if plan["peft"] else "model")
    assert manifest.verify_folder(saved) == []
    found["trains"] = True
    if plan["peft"]:
        report = merge(run, fsync=False)
        assert report["verification"]
        model = run / "merged"
    else:
        model = saved  # nothing to fold in: the whole model was saved
    found["merges"] = True
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        rows = tokenizer(["The patient has a fever."], return_tensors="pt")
        again = AutoModelForCausalLM.from_pretrained(model)(**rows).logits
        base = AutoModelForCausalLM.from_pretrained(plan["model"]["name_or_path"])(**rows).logits
    assert torch.isfinite(again).all() and not torch.equal(again, base)
    found["reloads"] = True


def test_the_table_in_the_readme_is_what_came_out(table):
    """`KIT_UPDATE=1` writes it."""
    yes = ["| recipe | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    yes += [f"| `{n}` | " + " | ".join("yes" if v else "NO" for v in r.values()) + " |" for n, r in table.items()]
    made = "\n".join(yes)
    text = TABLE.read_text()
    start, end = "<!-- table: tests/launch/test_recipes.py -->\n", "\n<!-- end -->"
    before, rest = text.split(start)
    held, after = rest.split(end)
    if os.environ.get("KIT_UPDATE"):
        TABLE.write_text(before + start + made + end + after)
        held = made
    assert held == made and "NO" not in made
