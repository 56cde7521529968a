"""Added tokens are trained, saved and merged; a run starts from another's adapter: in one process, ZeRO-2 and ZeRO-3.

One source run, one start of one process and one `deepspeed` launch of two, each with many runs in sequence.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from kit.launchers.command import free_port
from kit.storage import safetensors_header
from launch import harness

pytestmark = pytest.mark.launch
NEW = ["<|im_start|>", "<|im_end|>"]
SHORT = ("trainer.max_steps=4", "trainer.load_best_model_at_end=false", "trainer.eval_strategy=no",
         "trainer.save_strategy=no", "trainer.learning_rate=1.0e-2")  # fmt: skip
# Nothing moves, so what is saved is what the run began with; the evaluation before the first step tells its loss.
STILL = ("trainer.max_steps=1", "trainer.learning_rate=1e-30", "trainer.eval_on_start=true", *SHORT[1:2], *SHORT[3:4],
         "trainer.eval_strategy=steps")  # fmt: skip
TOKENS = ("tokenizer=chatml", *SHORT)
TWO = ("launch=deepspeed", "launch.num_gpus=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory, ops_dir) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def full(work) -> dict[str, Path]:
    """Two models without a spare row in their embeddings: untied and tied."""
    rows = len(tiny.SPECIAL) + len(set(tiny.WORDS))
    return {n: tiny.make_model(work / n, tied=n == "tied", vocab_size=rows, seed=5) for n in ("untied", "tied")}


@pytest.fixture(scope="module")
def source(work, base, chat) -> Path:
    """The run whose adapter others start from."""
    args = harness.overrides(base, chat, work / "source", "launch=local", *SHORT, "trainer.max_steps=8")
    done = harness.kit("train", *args, cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "source")


@pytest.fixture(scope="module")
def pickled(work, source) -> Path:
    """The source's adapter as older PEFT wrote it: a pickle, no manifest."""
    import torch
    from safetensors.torch import load_file

    folder = work / "pickled"
    folder.mkdir()
    shutil.copy(source / "adapter" / "adapter_config.json", folder)
    torch.save(load_file(source / "adapter" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    return folder


def compose(work: Path, base: Path, chat: Path, cases: dict[str, tuple[str, ...]]) -> list[str]:
    from kit import api
    from kit.storage import run_directory

    plans = []
    for name, more in cases.items():
        plan = api.compose(*harness.overrides(base, chat, work / name, *more), here=True)
        plans.append(str(run_directory.create_run_directory(plan, False).run_path / "plan.json"))
    return plans


def sequence(work: Path, plans: list[str], *launcher: str) -> None:
    script = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    done = harness.finish(harness.start([*launcher, script, *plans], work, DS_ACCELERATOR="cpu"), 400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(work, base, chat, full, source, pickled) -> Path:
    folder = work / "alone"
    start = f"peft.init_from={source}"
    cases = {
        "cold": STILL,
        "warm": (*STILL, start),
        "pickle": (*STILL, f"peft.init_from={pickled}", "peft.init_from_pickle=true"),
        "full": ("peft=none", f"model.name_or_path={full['untied']}", *TOKENS),
    }
    plans = compose(folder, base, chat, {n: ("launch=local", *c) for n, c in cases.items()})
    moving = (
        "launch=local",
        *SHORT,
        start,
        "trainer.max_steps=2",
        "trainer.save_strategy=steps",
        "trainer.save_steps=1",
    )
    plans += compose(folder, base, chat, {"resumed": moving})
    plans.append(f"{source_gone(Path(plans[-1]))}@checkpoint-1")
    sequence(work, plans, sys.executable)
    return folder


def source_gone(plan: Path) -> Path:
    """The same plan, beside it, with a source that is not there (any more)."""
    tree = json.loads(plan.read_text())
    tree["init_from"]["path"] = str(plan.parent / "gone")
    moved = plan.with_name("moved.json")
    moved.write_text(json.dumps(tree))
    return moved


@pytest.fixture(scope="module")
def together(work, base, chat, full, source) -> Path:
    folder = work / "together"
    cases = {}
    for engine in ("zero2", "zero3"):
        cases[f"warm-{engine}"] = (f"deepspeed={engine}", *STILL, f"peft.init_from={source / 'adapter'}")
        for name, model in full.items():
            cases[f"{name}-{engine}"] = (f"deepspeed={engine}", f"model.name_or_path={model}", *TOKENS)
    for name, model in full.items():
        cases[f"{name}-start"] = (
            "deepspeed=zero2",
            f"model.name_or_path={model}",
            *TOKENS,
            "trainer.learning_rate=1e-30",
        )
    plans = compose(folder, base, chat, {n: (*TWO, *c) for n, c in cases.items()})
    sequence(work, plans, "deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()))
    return folder


def tensors(folder: Path) -> dict:
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


# ---- warm start ----


def loss_at_start(run: Path) -> float:
    return harness.rows(run, "eval_loss")[0]


@pytest.mark.parametrize("case", ["alone/warm", "alone/pickle", "together/warm-zero2", "together/warm-zero3"])
def test_a_run_starts_where_its_source_ended(case, request, work, source):
    """The loss before the first step is the source's last, and without a step the saved adapter is the source's."""
    request.getfixturevalue(case.partition("/")[0])
    run = harness.the_run(work / case)
    ended = json.loads((source / "metrics.json").read_text())["eval_loss"]
    assert loss_at_start(run) == pytest.approx(ended, abs=1e-5)
    assert same(tensors(run / "adapter"), tensors(source / "adapter"))


def test_without_a_source_it_starts_elsewhere(alone, source):
    cold = harness.the_run(alone / "cold")
    ended = json.loads((source / "metrics.json").read_text())["eval_loss"]
    assert abs(loss_at_start(cold) - ended) > 0.1
    assert not same(tensors(cold / "adapter"), tensors(source / "adapter"))


def test_a_resumed_run_does_not_start_again_from_its_source(alone):
    """The second stretch, from checkpoint-1, named a source that is not there, and ended where the first had."""
    run = harness.the_run(alone / "resumed")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert steps.count(2) >= 2
    assert harness.status(run)["state"] == "done"
    last = tensors(run / "checkpoints" / "checkpoint-2")
    assert same(tensors(run / "adapter"), last)


# ---- added tokens ----


def ends(folder: Path) -> dict:
    """The embedding matrices by leaf name."""
    found = tensors(folder)
    return {k.split(".")[-2]: v for k, v in found.items() if k.endswith(("embed_tokens.weight", "lm_head.weight"))}


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_added_tokens_are_trained_saved_and_merged(model, engine, together, full):
    from kit.evaluation.generate import generate
    from kit.merging import merge

    run = harness.the_run(together / f"{model}-{engine}")
    before, saved = safetensors_header.read_model_config(full[model])["vocab_size"], ends(run / "adapter")
    assert sorted(saved) == ["embed_tokens", "lm_head"]
    assert all(matrix.shape[0] == before + 2 for matrix in saved.values())
    assert (saved["embed_tokens"] == saved["lm_head"]).all() == (model == "tied")

    merge(run, verify=True)
    assert safetensors_header.read_model_config(run / "merged")["vocab_size"] == before + 2
    assert safetensors_header.read_model_config(run / "merged")["tie_word_embeddings"] == (model == "tied")
    assert (ends(run / "merged")["embed_tokens"] == saved["embed_tokens"]).all()
    generation = json.loads((run / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [before + 1, 2]
    for folder in (run / "adapter", run / "merged"):
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        assert [t["content"] for t in vocabulary if t["id"] >= before] == NEW
        assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    told = generate(run, prompts=["the patient has"], max_new_tokens=8)
    assert told["adapter_equals_merged"]
    shutil.rmtree(run / "merged")


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_the_new_rows_moved(model, together):
    """Both ends of both new tokens, alike under both engines; the start is the same run with learning rate zero."""
    start = ends(harness.the_run(together / f"{model}-start") / "adapter")
    two, three = (ends(harness.the_run(together / f"{model}-{engine}") / "adapter") for engine in ("zero2", "zero3"))
    for name in start:
        assert float((two[name][-2:] - start[name][-2:]).abs().max(dim=1).values.min()) > 1e-3, name
        assert float((two[name] - three[name]).abs().max()) < 1e-4, name


def test_full_fine_tuning_grows_the_model(alone, full):
    run = harness.the_run(alone / "full")
    config = safetensors_header.read_model_config(run / "model")
    assert config["vocab_size"] == safetensors_header.read_model_config(full["untied"])["vocab_size"] + 2
    assert ends(run / "model")["lm_head"].shape[0] == config["vocab_size"]
