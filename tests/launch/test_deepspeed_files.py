"""DeepSpeed JSON that people pass on is trained with: mended, it trains as the kit's own preset of its stage.

One launch of two processes. Two of the four files train as they are; the other two are refused before a launch, and
the refusal names what `kit check --deepspeed FILE --fix` does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import source_ds

from kit import api
from kit.cli import verbs as cli
from kit.errors import DONE
from launch import harness

pytestmark = pytest.mark.launch
SAME = 1.5e-6  # absolute, float32: what ZeRO stages and offload differ by
PRESETS = {"catalogue_zero1": "zero1", "catalogue_zero2": "zero2", "catalogue_zero3": "zero3_offload",
           "doctor_zero2": "zero2"}  # fmt: skip
AS_THEY_ARE = ["catalogue_zero2", "catalogue_zero3"]
REFUSED = {  # on two processes: the key that is named, and its fix
    "catalogue_zero1": ("zero_optimization.cpu_offload", "offload_optimizer"),
    "doctor_zero2": ("train_batch_size", "train_batch_size=auto"),
}
STEPS = 6
SHORT = [f"trainer.max_steps={STEPS}", "trainer.eval_strategy=no", "trainer.save_strategy=no",
         "dataset.test_size=null", "trainer.load_best_model_at_end=false", "launch=deepspeed",
         "launch.num_gpus=2"]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed_files")


@pytest.fixture(scope="module")
def files(work: Path) -> dict[str, Path]:
    """Each file as it is, and mended as NAME.fixed."""
    raw = source_ds.write_all(work / "json")
    for file in raw.values():
        assert cli.run_verb(["check", "--deepspeed", str(file), "--fix"]) == DONE
    return raw | {f"{name}.fixed": file.with_suffix(".fixed.json") for name, file in raw.items()}


@pytest.fixture(scope="module")
def losses(work, files, base, chat, adam_ops_dir) -> dict[str, dict[int, float]]:
    """Step to loss of every run: the presets, the mended files, and those that train as they are."""
    names = [*dict.fromkeys(PRESETS.values()), *(f"{name}.fixed" for name in PRESETS), *AS_THEY_ARE]
    plans = []
    for name in names:
        choice = f"deepspeed={files.get(name, name)}"
        made = harness.kit("compose", *harness.overrides(base, chat, work / "runs" / name, choice, *SHORT), cwd=work)
        assert made.returncode == 0, made.stdout + made.stderr
        plans.append(json.loads(made.stdout)["plan"])
    script = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    from kit.launchers.command import free_port

    argv = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()), script, *plans]
    env = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(adam_ops_dir)}
    done = harness.finish(harness.start(argv, work, **env), 400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: harness.rows(harness.the_run(work / "runs" / name)) for name in names}


@pytest.mark.parametrize("name", PRESETS)
def test_mended_it_trains_as_the_preset_of_its_stage(losses, name):
    mine, preset = losses[f"{name}.fixed"], losses[PRESETS[name]]
    assert list(mine) == list(range(1, STEPS + 1)) == list(preset)
    assert mine == pytest.approx(preset, abs=SAME)
    assert len(set(mine.values())) == STEPS  # it learns, and not the same thing at every step


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_it_trains_as_it_is(losses, name):
    """With DeepSpeed's own AdamW, whose arithmetic is that of torch."""
    assert losses[name] == pytest.approx(losses[PRESETS[name]], abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_the_fix_named(files, base, chat, work, name):
    key, fix = REFUSED[name]
    problems = api.check(*harness.overrides(base, chat, work / "no", f"deepspeed={files[name]}", *SHORT))
    assert any(key in p.where and fix in p.fix for p in problems), problems
