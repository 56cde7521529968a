"""Ejected scripts, run for real: every loss, gradient norm and evaluation, and what is saved, as `kit train` has it.

`kit train` of one plan and its run.sh; all other plans of one process in one start, their scripts in another; and
ZeRO-2 and ZeRO-3 with two processes: one launch of the plans, one run.sh each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
from conftest import write_rows
from safetensors.torch import load_file

from kit import api
from kit.ejecting import verb
from kit.launchers.command import free_port
from kit.storage import run_directory
from launch import harness

pytestmark = pytest.mark.launch
EXACT = 1e-6  # absolute, in float32
STEPS = 6
SHORT = (f"trainer.max_steps={STEPS}", "trainer.eval_steps=3", "trainer.save_steps=3")
TWO = ("launch=deepspeed", "launch.num_gpus=2")
ZERO = {"zero2": ("deepspeed=zero2", *TWO), "zero3": ("deepspeed=zero3", "peft.lora_dropout=0.05", *TWO)}


@pytest.fixture(scope="module")
def work(tmp_path_factory, ops_dir) -> Path:
    return tmp_path_factory.mktemp("ejected")


@pytest.fixture(scope="module")
def files(work) -> dict[str, Path]:
    """The same words as texts under another name, as questions with missing answers, and as prompts in two files."""
    words = tiny.chat_rows(96)
    turns = [[m["content"] for m in row["messages"]] for row in words]
    quotes = [{"text": "not this", "quote": f"{a} {b}"} for a, b in turns]
    asked = [
        {"Question": a, "Answer": (None, " ", b)[min(i % 7, 2)], "Note": "be brief"} for i, (a, b) in enumerate(turns)
    ]
    folder = work / "parts"
    folder.mkdir()
    for part in (0, 1):
        write_rows(folder / f"{part}.jsonl", tiny.prompt_rows(48)[part::2])
    held_out = write_rows(work / "held_out.jsonl", tiny.prompt_rows(20)[::3])
    return {
        "quotes": write_rows(work / "quotes.jsonl", quotes),
        "asked": write_rows(work / "asked.json", asked),
        "parts": folder,
        "held_out": held_out,
    }


@pytest.fixture(scope="module")
def trained(work, base, chat) -> Path:
    """`kit train`: chats, the loss on the answers, a validation part and a test part of their own."""
    args = harness.overrides(base, chat, work / "chat", "launch=local", "dataset.validation_size=8", *SHORT)
    done = harness.kit("train", *args, cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return harness.the_run(work / "chat")


def one_process(files: dict[str, Path], source: Path) -> dict[str, tuple[str, ...]]:
    """A case for every part of a plan that the script must carry over."""
    asked = (f"dataset.path={files['asked']}", "trainer.assistant_only_loss=false")
    return {
        "text": (
            f"dataset.path={files['quotes']}", "dataset.columns.text=quote", "trainer.assistant_only_loss=false",
            "dataset.limit=40", "trainer.packing=true", "dataset.test_size=0.2",
        ),
        "template": (
            *asked, "dataset.template.prompt='Asked: {Question} Answer:'", "dataset.template.completion=' {Answer}'",
            "dataset.validation_size=10", "dataset.test_size=9", "dataset.eval_limit=7",
        ),
        "turns": (
            *asked, "dataset.template.system='{Note}'", "dataset.template.user='{Question}'",
            "dataset.template.assistant='{Answer}'", "dataset.format=prompt_completion",
        ),
        "files": (
            f"dataset.path={files['parts']}", f"dataset.eval_path={files['held_out']}", "dataset.test_size=null",
            "trainer.assistant_only_loss=false", "trainer.completion_only_loss=true",
        ),
        "nf4": ("quantization=nf4", "trainer.lr_scheduler_type=cosine_with_min_lr",
                "trainer.lr_scheduler_kwargs={min_lr: 1.0e-5}"),
        "full": ("peft=none", "trainer.learning_rate=1.0e-3", "trainer.weight_decay=0.1"),
        "random": ("peft=none", "model.random_init=true", "trainer.gradient_checkpointing=true"),
        "tokens": ("tokenizer=chatml", "trainer.assistant_only_loss=false"),
        "ia3": ("peft=none", "++peft.peft_type=IA3", "++peft.task_type=CAUSAL_LM"),
        "dora": ("peft.use_dora=true", "peft.use_rslora=true", "peft.rank_pattern={q_proj: 8}", "trainer.bf16=true"),
        "source": (f"peft.init_from={source}",),
    }  # fmt: skip


CASES = "text template turns files nf4 full random tokens ia3 dora source".split()


@pytest.fixture(scope="module")
def pairs(work, base, chat, files, trained) -> dict[str, tuple[Path, Path]]:
    """Run directory and ejected folder of every case of one process, both run to their end."""
    cases = one_process(files, trained)
    assert list(cases) == CASES
    runs = [compose(work, base, chat, name, "launch=local", *more) for name, more in cases.items()]
    sequence = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    run_all([sys.executable, sequence, *(str(run / run_directory.PLAN) for run in runs)], work)
    folders = [eject(work, name, run) for name, run in zip(cases, runs, strict=True)]
    ejected = str(harness.ROOT / "tests" / "launch" / "ejected.py")
    run_all([sys.executable, ejected, *map(str, folders)], work)
    return dict(zip(cases, zip(runs, folders, strict=True), strict=True))


@pytest.fixture(scope="module")
def launched(work, base, chat) -> dict[str, tuple[Path, Path]]:
    """The same of ZeRO-2 and ZeRO-3; the script is started by its run.sh."""
    runs = [compose(work, base, chat, name, *more) for name, more in ZERO.items()]
    sequence = str(harness.ROOT / "tests" / "launch" / "sequence.py")
    start = ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()), sequence]
    run_all([*start, *(str(run / run_directory.PLAN) for run in runs)], work)
    found = {}
    for name, run in zip(ZERO, runs, strict=True):
        folder = eject(work, name, run)
        run_all([str(folder / "run.sh")], work)
        found[name] = (run, folder)
    return found


def compose(work: Path, base: Path, chat: Path, name: str, *more: str) -> Path:
    plan = api.compose(*harness.overrides(base, chat, work / name, *SHORT, *more), here=True)
    return run_directory.create_run_directory(plan).run_path


def eject(work: Path, name: str, run: Path) -> Path:
    plan, _ = verb.read_plan_and_folder([str(run)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the harness starts the run: more threads sum in another order
        verb.write_ejected(plan, work / "scripts" / name)
    return work / "scripts" / name


def run_all(argv: list[str], work: Path) -> None:
    from kit.launchers import ops

    env = {"DS_ACCELERATOR": "cpu", "MASTER_PORT": str(free_port()), "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir())}
    env |= {"HF_DATASETS_CACHE": str(work / "datasets")}
    done = harness.finish(harness.start(argv, work, **env), 400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def history(folder: Path, key: str) -> dict[int, float]:
    """Step to value from trainer_state.json; an evaluation after training counts, as in metrics.jsonl."""
    rows = json.loads((folder / "checkpoints" / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same(run: Path, folder: Path) -> None:
    """Losses, norms and evaluations within EXACT of each other, the same tensors saved."""
    for key, count in (("loss", STEPS), ("grad_norm", STEPS), ("eval_loss", 2)):
        ours, theirs = harness.rows(run, key), history(folder, key)
        assert ours.keys() == theirs.keys() and len(ours) == count, key
        assert max(abs(ours[s] - theirs[s]) / max(1, abs(ours[s])) for s in ours) <= EXACT, (key, ours, theirs)
    kind, file = ("adapter", "adapter_model") if (run / "adapter").is_dir() else ("model", "model")
    saved, wanted = (load_file(place / kind / f"{file}.safetensors") for place in (folder, run))
    assert saved.keys() == wanted.keys() and saved
    for name, tensor in wanted.items():
        assert saved[name].shape == tensor.shape
        assert (saved[name].float() - tensor.float()).abs().max() <= 1e-5, name
    assert (folder / kind / "tokenizer.json").is_file()


def test_chats_by_run_sh(work, trained):
    folder = eject(work, "chat", trained)
    run_all([str(folder / "run.sh")], work)
    assert_same(trained, folder)


@pytest.mark.parametrize("case", CASES)
def test_one_process(case, pairs):
    run, folder = pairs[case]
    assert_same(run, folder)
    if case in ("full", "random"):  # a saved model has the base's use_cache
        assert json.loads((folder / "model" / "config.json").read_text())["use_cache"] is True


def test_the_cases_are_of_different_losses(pairs, trained):
    """Else equal losses would say nothing about what a case adds."""
    first = {name: tuple(harness.rows(run).values()) for name, (run, _) in pairs.items()}
    first["chat"] = tuple(harness.rows(trained).values())
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("case", ZERO)
def test_two_processes_under_deepspeed(case, launched):
    run, folder = launched[case]
    assert_same(run, folder)
