"""`kit fetch` against a Hub on 127.0.0.1, and what runs offline from the cache that it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hub_server
import pytest
import tiny

from kit.errors import DONE, ENVIRONMENT, REFUSED

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"
STOCK = ["model.name_or_path=org/tiny", "dataset.path=org/chat"]
CARD = """---
configs:
- config_name: talk
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test.jsonl
- config_name: other
  data_files: other/*.jsonl
---
A data set.
"""

# Several command lines in one process, each with its exit code and what it said; huggingface_hub reads the environment
# once, so another environment is another process.
PROBE = """
import contextlib, io, json, sys
exec(sys.argv[2])
from kit.cli import verbs as cli
answers = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run_verb(argv)
    answers.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted({n.partition(".")[0] for n in sys.modules})]))
"""


@dataclass
class Place:
    """A Hub, a private HF_HOME, and the command line there."""

    hub: hub_server.Hub
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_ENDPOINT": self.hub.url}
        env |= {"HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
            env.pop(name, None)
        return env | more

    def kit(self, *lines: list[str], before: str = "", **env: str) -> list[tuple[int, str, str]]:
        argv = [sys.executable, "-c", PROBE, json.dumps(lines), before]
        done = subprocess.run(
            argv, cwd=self.home.parent, env=self.environment(**env), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        answers, imported = json.loads(done.stdout.splitlines()[-1])
        assert not {"torch", "transformers", "datasets", "numpy", "pyarrow"} & set(imported)
        return [(code, out, err) for code, out, err in answers]

    def offline(self, *lines: list[str]) -> list[tuple[int, str, str]]:
        return self.kit(*lines, HF_HUB_OFFLINE="1", HF_ENDPOINT=NOWHERE)


def rows(data: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in data).encode()


@pytest.fixture(scope="module")
def hub(base: Path) -> Iterator[hub_server.Hub]:
    files = hub_server.read_folder(base)
    chat = tiny.chat_rows(32)
    with hub_server.serve() as hub:
        unwanted = {"pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "original/consolidated.00.pth": b"x"}
        unwanted |= {"consolidated.safetensors": b"x", "modeling_tiny.py": b"raise SystemExit(9)"}
        hub.models["org/tiny"] = hub_server.Repo(files | unwanted)
        hub.datasets["org/chat"] = hub_server.Repo({
            "README.md": CARD.encode(), "data/train-0.jsonl": rows(chat[:16]), "data/train-1.jsonl": rows(chat[16:]),
            "data/test.jsonl": rows(chat[:4]), "other/a.jsonl": b'{"a": 1}\n', "chat.py": b"raise SystemExit(9)",
        })  # fmt: skip
        hub.models["org/gated"] = hub_server.Repo(files, gated=True)
        without = {name: content for name, content in files.items() if name != "model.safetensors"}
        hub.models["org/pickles"] = hub_server.Repo(without | {"pytorch_model.bin": b"x"})
        hub.models["org/bare"] = hub_server.Repo(without)
        hub.models["org/adapter"] = hub_server.Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
        hub.datasets["org/script"] = hub_server.Repo({"README.md": b"x", "script.py": b"raise SystemExit(9)"})
        choice = CARD.replace("  default: true\n", "")
        hub.datasets["org/several"] = hub_server.Repo({"README.md": choice.encode(), "data/train-0.jsonl": rows(chat)})
        yield hub


@pytest.fixture
def place(hub, tmp_path: Path) -> Iterator[Place]:
    hub.seen.clear()
    hub.sent.clear()
    yield Place(hub, tmp_path / "home")
    hub.status, hub.silent = 0, 0


@pytest.fixture(scope="module")
def fetched(hub, tmp_path_factory) -> tuple[Place, list[tuple[int, str, str]], set[str]]:
    """A cache filled by a dry run, which fills nothing, and a real one: what they said, and what was downloaded."""
    place = Place(hub, tmp_path_factory.mktemp("fetched") / "home")
    hub.seen.clear()
    [dry] = place.kit(["fetch", *STOCK, "--dry-run"])
    assert not (place.home / "hub").exists()
    said = place.kit(["fetch", *STOCK], ["fetch", *STOCK])
    return place, [dry, *said], hub.downloaded()


def test_what_training_needs_and_nothing_else(fetched, base):
    place, said, downloaded = fetched
    assert [code for code, _, _ in said] == [DONE] * 3, said
    wanted = {name for name in hub_server.read_folder(base)}
    assert downloaded == wanted | {"README.md", "data/train-0.jsonl", "data/train-1.jsonl", "data/test.jsonl"}
    dry, first, second = (out for _, out, _ in said)
    assert "model.safetensors 80.6 kB" in dry and "to fetch" in dry and "fetched " not in dry
    assert "fetched   4/4" in first and "fetched " not in second and "0 B to fetch" in second
    pins = f"model.revision={place.hub.models['org/tiny'].commit} dataset.revision="
    assert pins + place.hub.datasets["org/chat"].commit in first


def test_the_run_is_checked_offline_from_the_cache(fetched):
    """The data set's columns are known, at the branch and at the pinned commit; an unknown commit is not here."""
    place, _, _ = fetched
    pins = [f"model.revision={place.hub.models['org/tiny'].commit}"]
    pins += [f"dataset.revision={place.hub.datasets['org/chat'].commit}"]
    line = ["check", "--here", "trainer.use_cpu=true", *STOCK]
    wrong = [*line, "dataset.columns.text=body"]
    elsewhere = [*line, f"model.revision={'a' * 40}", f"dataset.revision={'b' * 40}"]
    found = place.offline(line, [*line, *pins], wrong, [*wrong, *pins], elsewhere, [*line, "dataset.name=talks"])
    assert [code for code, _, _ in found] == [DONE, DONE] + [REFUSED] * 4, found
    assert all("has no column 'body'; it has messages" in err for _, _, err in found[2:4])
    assert f"kit fetch model.name_or_path=org/tiny model.revision={'a' * 40}" in found[4][2]
    assert f"kit fetch dataset.path=org/chat dataset.revision={'b' * 40}" in found[4][2]
    assert "one of talk, other" in found[5][2]


@pytest.mark.launch
def test_two_steps_offline(fetched, tmp_path):
    place, _, _ = fetched
    small = ["trainer.use_cpu=true", "trainer.bf16=false", "trainer.max_steps=2", "trainer.logging_steps=1"]
    small += ["trainer.max_length=64", "dataset.eval_split=test", f"runs_dir={tmp_path}"]
    env = place.environment(HF_HUB_OFFLINE="1", HF_ENDPOINT=NOWHERE)
    argv = [sys.executable, "-m", "kit", "train", *STOCK, *small]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == DONE, done.stdout[-2000:] + done.stderr[-3000:]
    assert "data      32 rows, 4 held out" in done.stdout  # both files of the split
    [metrics] = tmp_path.glob("*/metrics.json")
    assert json.loads(metrics.read_text())["step"] == 2
    plan = json.loads((metrics.parent / "plan.json").read_text())
    assert len(plan["base"]["fingerprint"]) == 64


def test_what_is_not_in_the_cache_is_refused_before_loading(place):
    named = ["model.name_or_path=org/none", "dataset.path=org/none", "tokenizer.name_or_path=org/words"]
    line = ["trainer.use_cpu=true", *named]
    there, here, train = place.offline(["check", *line], ["check", "--here", *line], ["train", *line])
    assert there[0] == DONE and "kit fetch model.name_or_path=org/none" in there[1]
    for code, _, err in (here, train):
        assert code == REFUSED
        for command in named:
            assert f"kit fetch {command}\n" in err + "\n"


def test_a_part_is_not_the_whole(place, base):
    """Weights or data files that are missing from the cache are seen; fetching again brings those alone."""
    assert place.kit(["fetch", *STOCK])[0][0] == DONE
    lost = ["model.safetensors", "data/train-1.jsonl"]
    for name in lost:
        [pointer] = place.home.glob(f"hub/*/snapshots/*/{name}")
        pointer.resolve().unlink()
    check = ["check", "--here", "trainer.use_cpu=true", *STOCK]
    [(code, _, err)] = place.offline(check)
    assert code == REFUSED and "kit fetch model.name_or_path=org/tiny" in err and "kit fetch dataset.path=" in err
    place.hub.seen.clear()
    assert place.kit(["fetch", *STOCK])[0][0] == DONE
    assert place.hub.downloaded() == set(lost)
    assert place.offline(check)[0][0] == DONE


REFUSALS = [
    ("model.name_or_path=org/nope", REFUSED, "there is no model org/nope, or it is private and you are not logged in"),
    ("model.name_or_path=org/tiny model.revision=v9", REFUSED, "no such revision\n  where: model.revision"),
    ("model.name_or_path=org/pickles", REFUSED, "only pickles (pytorch_model.bin)", "refs/pr/NUMBER"),
    ("model.name_or_path=org/bare", REFUSED, "holds no weights"),
    ("model.name_or_path=org/adapter", REFUSED, "is an adapter", "base model"),
    ("model.name_or_path=org/gated", ENVIRONMENT, "not logged in", "/org/gated", "hf auth login"),
    ("dataset.path=org/nope", REFUSED, "no data set org/nope", "/datasets/org/nope"),
    ("dataset.path=org/script", REFUSED, "only a script (script.py)", "refs/convert/parquet"),
    ("dataset.path=org/several", REFUSED, "several configurations", "one of talk, other"),
    ("model.name_or_path=org/tiny trainer.lerning_rate=1", REFUSED, "learning_rate"),
]


@pytest.mark.launch
def test_refusals_name_page_and_fix(place):
    found = place.kit(*[["fetch", *line.split()] for line, *_ in REFUSALS])
    for (line, code, *words), (got, _, err) in zip(REFUSALS, found, strict=True):
        assert got == code, (line, err)
        assert all(word in err for word in words), (line, err)
    assert not list(place.home.glob("hub/*/snapshots/*/*.safetensors"))
    assert place.hub.seen[-1][1] == "/datasets/org/several/resolve/" + place.hub.datasets["org/several"].commit + (
        "/README.md"  # the last line was refused for its description: nothing was asked
    )


def test_with_a_token_that_is_never_shown(place):
    lines = [["fetch", "model.name_or_path=org/gated"], ["fetch", "model.name_or_path=org/nope"]]
    gated, nope = place.kit(*lines, HF_TOKEN="hf_secret_secret")
    assert gated[0] == ENVIRONMENT and "your account has no access" in gated[2]
    assert nope[0] == REFUSED and "your account may not see it" in nope[2]
    [(code, _, err)] = place.kit(lines[1], HF_TOKEN="hf_wrong")
    assert code == ENVIRONMENT and "the Hub does not know your token" in err and "hf auth login" in err
    assert "hf_secret" not in json.dumps([gated, nope])
    assert not [f for f in place.home.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


@pytest.mark.launch
def test_no_network_no_hub_no_room(place):
    [(code, _, err)] = place.kit(["fetch", *STOCK], HF_ENDPOINT=NOWHERE)
    assert code == ENVIRONMENT and f"{NOWHERE} cannot be reached" in err
    [(code, _, err)] = place.kit(["fetch", *STOCK], HF_HUB_OFFLINE="1")
    assert code == ENVIRONMENT and "HF_HUB_OFFLINE is set" in err
    full = "import shutil; shutil.disk_usage = lambda place: shutil._ntuple_diskusage(10**6, 10**6, 1000)"
    [(code, _, err)] = place.kit(["fetch", *STOCK], before=full)
    assert code == ENVIRONMENT and "90 kB are to be fetched, 1 kB are free" in err, err
    assert place.hub.downloaded() <= {"README.md"} and not (place.home / "hub").exists()
    place.hub.status = 503
    [(code, _, err)] = place.kit(["fetch", *STOCK])
    assert code == ENVIRONMENT and "the Hub answered 503" in err
    place.hub.silent = 3
    [(code, _, err)] = place.kit(
        ["fetch", STOCK[0]], before="from kit.hub import repository; repository.HUB_TIMEOUT = 1"
    )
    assert code == ENVIRONMENT and "cannot be reached: " in err and "timed out" in err, err


def test_one_part_alone_and_all_refusals_at_once(place):
    """As the refusals of an offline run name it; a line that names nothing, or two wrong things, says all of it."""
    lines = [["fetch", part] for part in ("tokenizer.name_or_path=org/gated", "dataset.path=org/chat")]
    both = ["fetch", "model.name_or_path=org/bare", "dataset.path=org/nope", "dataset.eval_path=org/chat"]
    tokenizer, data, nothing, two = place.kit(*lines, ["fetch"], both)
    assert tokenizer[0] == ENVIRONMENT and "tokenizer.name_or_path" in tokenizer[2]
    assert "model.safetensors" not in tokenizer[1]
    assert data[0] == DONE and "dataset.revision=" in data[1]
    assert nothing[0] == REFUSED and "model.name_or_path is not given" in nothing[2]
    assert two[0] == REFUSED and "holds no weights" in two[2] and "no data set org/nope" in two[2]


def test_local_things_are_passed_over(place, base, chat):
    line = ["fetch", f"model.name_or_path={base}", f"dataset.path={chat}"]
    [(code, out, _)] = place.kit(line)
    assert code == DONE and f"here      {base} (model.name_or_path)" in out and "nothing   to fetch" in out
    assert place.hub.seen == []


def test_a_broken_connection_goes_on_where_it_broke(place):
    place.hub.break_after["model.safetensors"] = 50_000
    small = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 10_000"  # it holds 10 MB back
    [(code, _, err)] = place.kit(["fetch", STOCK[0]], before=small)
    assert code == DONE, err
    ranges = [r for method, path, r in place.hub.seen if method == "GET" and path.endswith("/model.safetensors") and r]
    assert ranges == ["bytes=50000-"]
    assert place.offline(["check", "--here", *STOCK[:1], "dataset.path=org/chat"])[0][2].count("org/tiny") == 0


@pytest.mark.launch
def test_killed_and_started_again(place):
    """Whole files stay and are not fetched twice. huggingface_hub 2.4 drops the part of a file: it starts anew."""
    place.hub.stall["model.safetensors"] = 20
    argv = [sys.executable, "-m", "kit", "fetch", STOCK[0]]
    process = subprocess.Popen(argv, env=place.environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("fetched   5/6") for line in lines)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [part] = place.home.glob("hub/*/blobs/*.incomplete")
    os.utime(part, (time.time() - 7200,) * 2)
    check = ["check", "--here", "trainer.use_cpu=true", STOCK[0], "dataset.path=org/chat"]
    assert "kit fetch model.name_or_path=org/tiny" in place.offline(check)[0][2]
    place.hub.seen.clear()
    assert place.kit(["fetch", STOCK[0]])[0][0] == DONE
    assert place.hub.downloaded() == {"model.safetensors"}
    assert not part.exists()
    assert "org/tiny" not in place.offline(check)[0][2]
