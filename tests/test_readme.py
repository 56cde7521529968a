"""Every command in the READMEs is typed here as it stands there, or is one of the two that the whole suite is."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kit import api
from kit.cli import train
from kit.cli import verbs as cli
from kit.launchers.slurm import CHAINED_VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "recipes/README.md", "launch/README.md", "tests/README.md"]
ELSEWHERE = {
    "make quickstart": "tests/launch/test_quickstart.py",
    "make test": "this suite",
    "make test-fast": "this suite",
    "make soak": "run by hand; its JSON is in benchmarks/results",
    "make bench": "run by hand; its JSON is in benchmarks/results",
    "make bench-gpu": "run by hand, on GPUs; tests/test_benchmarks.py rehearses it",
    "make mask-table": "run by hand, it needs npm; tests/data/test_masks.py reads its JSON",
}


def commands() -> list[str]:
    """The lines of all fenced blocks that start with a command, without their comments."""
    found = []
    for page in PAGES:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M):
            for line in block.splitlines() if not language else ():
                command = line.split("  #")[0].strip()
                if command.startswith(("kit ", "make ", "deepspeed ", "launch/", "salloc ")):
                    found.append(command)
    return found


@pytest.fixture
def there(base, chat, tmp_path, monkeypatch):
    """A folder where the README's names exist: chats.jsonl, my_run.yaml, launch/hostfile.example."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "chats.jsonl").write_text(chat.read_text())
    text = (ROOT / "README.md").read_text()
    example = re.search(r"```yaml\n(# my_run.yaml.*?)```", text, re.S)
    assert example
    (tmp_path / "my_run.yaml").write_text(example[1])
    return tmp_path


def test_every_command_is_known():
    assert len(commands()) >= 15
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert command in ELSEWHERE
            target = words[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
        elif words[0] == "kit":
            assert words[1] in cli.VERBS


LOOKS = ("kit doctor", "kit check --", "kit plan", "kit why", "kit diff", "kit import", "kit eject")


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if c.startswith(LOOKS)])
def test_what_only_looks_is_run_as_it_stands(command, there, capsys):
    (there / "my_ds.json").write_text(
        '{"zero_optimization": {"stage": 2, "cpu_offload": true}, "gradient_cliping": 1}'
    )
    (there / "axolotl.yaml").write_text(
        "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\nsequence_len: 512\n"
        "micro_batch_size: 1\nnum_epochs: 1\ndatasets: [{path: chats.jsonl, type: chat_template}]\n"
    )
    assert cli.run_verb(shlex.split(command)[1:]) in ((0, 3) if "doctor" in command else (0,)), capsys.readouterr().err
    made = {"--fix": "my_ds.fixed.json", "import": "imported.yaml", "eject": "plain/train.py"}
    assert all((there / file).is_file() for word, file in made.items() if word in command.split())


def test_the_looking_commands_are_all_there():
    assert len([c for c in commands() if c.startswith(LOOKS)]) >= 7


@pytest.mark.launch
def test_a_run_of_your_own_trains(there, tmp_path):
    """my_run.yaml on a base that has no chat template, as the one that it names has none."""
    import tiny

    model = tiny.make_model(tmp_path / "base")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    small = ["trainer.max_length=128", "trainer.max_steps=1", "trainer.use_cpu=true", "global_batch_size=2"]
    command = [sys.executable, "-m", "kit", "train", "my_run.yaml", f"model.name_or_path={model}", "deepspeed=none"]
    command += ["trainer.per_device_train_batch_size=2", "launch=local", *small]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert list(tmp_path.glob("runs/my_run-*/adapter/chat_template.jinja"))


DESCRIBED = re.compile(r"(kit check(?! --)|kit train|kit list|kit compose|salloc .*kit train)")


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if DESCRIBED.match(c)])
def test_descriptions_are_valid(command, there, capsys):
    """`kit check` takes the overrides of every `kit train` in the READMEs, and every point of a sweep."""
    flags, then, words = train.split_train_flags(shlex.split(command.partition("kit ")[2]))[1:]
    assert set(then) <= set(CHAINED_VERBS) and (not (flags or then) or "launch=slurm" in words)
    words[0] = "check" if words[0] in ("train", "compose") else words[0]
    choices = [[w] for w in words if w != "-m"]
    if "-m" in words:
        pairs = [w.partition("=") for [w] in choices]
        choices = [[f"{key}{equals}{value}" for value in values.split(",")] for key, equals, values in pairs]
    for point in itertools.product(*choices):
        assert cli.run_verb(list(point)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if c.startswith("deepspeed")])
def test_launcher_lines_are_valid(command, there):
    """What stands behind kit.worker is composed as rank 0 would; tests/launch starts such lines for real.

    Lines that begin with launch/ are for tests/test_launch_scripts.py.
    """
    words = shlex.split(command)
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    count = words[words.index("--num_gpus") + 1] if "--num_gpus" in words else words[1]
    if overrides:
        assert api.compose(*overrides, world_size=int(count)).world_size == int(count)
    else:
        assert words[-1].endswith("plan.json")


def test_verbs_that_take_a_run_know_their_options(capsys):
    for command in commands():
        words = shlex.split(command)
        if words[0] == "kit" and words[1] in ("merge", "generate", "eval", "resume", "watch", "launch-node"):
            with pytest.raises(SystemExit):
                cli.run_verb([words[1], "--help"])
            text = capsys.readouterr().out
            for flag in [w for w in words if w.startswith("--")]:
                assert flag in text, (command, flag)


def test_what_a_further_trial_costs_is_as_recorded():
    """The table of launch/README.md, from the results of warm_sweep.py; README.md quotes the 8B row."""
    results = ROOT / "tests/benchmarks/results"
    rows = json.loads((results / "2026-11-26-h200-warm-sweep.json").read_text())["rows"]
    rows |= json.loads((results / "2026-11-26-warm-sweep.json").read_text())["rows"]
    table = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "launch/README.md").read_text(), re.MULTILINE)
    assert len(table) == 4
    for base, said in zip(("tiny", "8b", "1b7-nf4", "1b7-int8"), table, strict=True):
        cold, warm = (rows[f"{base} {workers}"] for workers in ("cold", "warm"))
        assert said == tuple(f"{statistics.median(row['further_seconds']):.1f}" for row in (cold, warm)), base
        assert base == "tiny" or (cold["adapters"] == warm["adapters"]) == (base != "8b")
    exact = [rows[f"8b-exact {workers}"]["adapters"] for workers in ("cold", "again", "warm")]
    assert exact[0] == exact[1] == exact[2] and rows["8b cold"]["adapters"] != rows["8b again"]["adapters"]
    text = " ".join((ROOT / "README.md").read_text().split())
    cold, warm = (statistics.median(rows[f"8b {workers}"]["further_seconds"]) for workers in ("cold", "warm"))
    assert f"costs {warm:.1f} s beyond its training, and {cold:.0f} s in a process of its own" in text


def test_figures_of_the_readme_are_the_recorded_ones():
    """The quickstart's percentages in the README stand in the recorded result."""
    recorded = json.loads((ROOT / "tests/benchmarks/results/quickstart.json").read_text())
    text = (ROOT / "README.md").read_text()
    tuned = round(100 * recorded["exact_match"]["adapter"])
    frequent = round(100 * recorded["exact_match"]["most_frequent"])
    assert f"{tuned} % tuned" in " ".join(text.split()) and f"{frequent} % for always giving" in " ".join(text.split())


def test_how_long_rows_take_is_as_recorded():
    recorded = json.loads((ROOT / "tests/benchmarks/results/2026-11-29-h200-data-200k.json").read_text())["cases"]
    seconds = {name: case["seconds"] for name, case in recorded.items()}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"took {seconds['marked']:.0f} s with 16 processes" in text and seconds["derived"] < 1.1 * seconds["marked"]
    assert f"{seconds['cached']:.1f} s the second time, and {seconds['trl']:.0f} s in SFTTrainer itself" in text
    assert f"{recorded['marked']['tokens'] / 1e6:.0f} million tokens" in text
