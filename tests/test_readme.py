"""Every command in the READMEs is typed here as it stands there, or is one of the two that the whole suite is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from kit import api, cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "recipes/README.md", "launch/README.md", "tests/README.md"]
STARTS = ("deepspeed ", "launch/", "kit train", "kit merge", "kit generate", "kit eval", "kit resume")
ELSEWHERE = {
    "make quickstart": "tests/launch/test_quickstart.py",
    "make test": "this suite",
    "make test-fast": "this suite",
    "make soak": "run by hand; its JSON is in benchmarks/results",
    "make bench": "run by hand; its JSON is in benchmarks/results",
}


def commands() -> list[str]:
    """The lines of all fenced blocks that start with a command, without their comments."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", (ROOT / page).read_text(), re.S):
            for line in block.splitlines():
                command = line.split("  #")[0].strip()
                if command.startswith(("kit ", "make ", "deepspeed ", "launch/")):
                    found.append(command)
    return found


@pytest.fixture
def there(base, chat, tmp_path, monkeypatch):
    """A folder where the README's names exist: chats.jsonl, my_run.yaml."""
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize(
    "command", [c for c in dict.fromkeys(commands()) if c.startswith(("kit check", "kit train", "kit list"))]
)
def test_descriptions_are_valid(command, there, capsys):
    """`kit check` takes the overrides of every `kit train` in the READMEs."""
    words = [w for w in shlex.split(command)[1:] if not w.startswith("-")]
    words[0] = "check" if words[0] == "train" else words[0]
    assert cli.run(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if c.startswith(("deepspeed", "launch/"))])
def test_launcher_lines_are_valid(command, there):
    """What stands behind kit.worker is composed as rank 0 would; tests/launch starts such lines for real."""
    words = shlex.split(command)
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    count = words[words.index("--num_gpus") + 1] if "--num_gpus" in words else words[1]
    if overrides:
        assert api.compose(*overrides, world_size=int(count)).world_size == int(count)
    else:
        assert words[-1].endswith("plan.json")
    if words[0].startswith("launch/"):
        assert (ROOT / words[0]).stat().st_mode & 0o111


def test_verbs_that_take_a_run_know_their_options(capsys):
    for command in commands():
        words = shlex.split(command)
        if words[0] == "kit" and words[1] in ("merge", "generate", "eval", "resume"):
            with pytest.raises(SystemExit):
                cli.run([words[1], "--help"])
            text = capsys.readouterr().out
            for flag in [w for w in words if w.startswith("--")]:
                assert flag in text, (command, flag)


def test_figures_of_the_readme_are_the_recorded_ones():
    """The quickstart's percentages in the README stand in the recorded result."""
    recorded = json.loads((ROOT / "tests/benchmarks/results/quickstart.json").read_text())
    text = (ROOT / "README.md").read_text()
    tuned = round(100 * recorded["exact_match"]["adapter"])
    frequent = round(100 * recorded["exact_match"]["most_frequent"])
    assert f"{tuned} % tuned" in " ".join(text.split()) and f"{frequent} % for always giving" in " ".join(text.split())
