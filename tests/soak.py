"""Campaigns that are too long for the suite; `make soak`. A small instance of each is in the suite.

    python tests/soak.py [--only fuzz|honour|data|kill|resume|nvme|slurm] [--n N] [--seed S] --out FILE

fuzz    N spoiled command lines and files through the checks: a plan or a list of problems, never another exception.
honour  N valid runs with one key changed (tests/mutate.py): refused by name, or found in what the libraries are given.
data    N spoiled rows of all formats, from a file to tokens: each is encoded or counted with a reason, alone as among
        others.
kill    N runs that save every 2 steps, each killed (SIGKILL, the whole tree) at a random moment: what is found then is
        nothing or a complete checkpoint, and `kit resume` goes on from it.
resume  one run killed N times and resumed until it is done: losses and adapter are those of a run left alone.
nvme    N launches of ds_configs/zero3_nvme.json: three steps on two processes, with the losses of zero1.json.
slurm   N jobs under a SLURM of our own, each signalled at a random step, preempted at another, and queued again both
        times, with the two minutes that SLURM holds such a job; losses and adapter are those of a run left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COUNTS = {"fuzz": 2000, "honour": 10_000, "data": 50_000, "kill": 20, "resume": 5, "nvme": 1, "slurm": 10}
LIMIT = 20  # seconds that the checks of one spoiled command line may take

# ------------------------------------------------------------------------------------------------------------ fuzz

VALID: list[list[str]] = [
    [],
    ["deepspeed=zero1", "launch.num_gpus=4"],
    ["deepspeed=zero2", "deepspeed.zero_optimization.reduce_bucket_size=2e8"],
    ["deepspeed=zero3_offload", "launch.num_gpus=8"],
    ["deepspeed=zero3_nvme", "deepspeed.zero_optimization.offload_optimizer.nvme_path=/x"],
    ["peft=none", "trainer.learning_rate=1e-5"],
    ["peft.use_dora=true", "peft.target_modules=[q_proj,v_proj]", "peft.rank_pattern={q_proj:4}"],
    ["trainer.eval_strategy=steps", "trainer.eval_steps=5", "dataset.test_size=0.1"],
    ["global_batch_size=16", "trainer.per_device_train_batch_size=4"],
    ["trainer.lr_scheduler_kwargs={min_lr: 1.0e-6}", "trainer.lr_scheduler_type=cosine_with_min_lr"],
    ["quantization.load_in_4bit=true", "quantization.bnb_4bit_quant_type=nf4"],
    ["recipe=quickstart", "peft.r=4", "launch.num_gpus=2", "launch=deepspeed", "deepspeed=zero3"],
    ["launch.master_port=29500", "runs_dir=elsewhere", "name=mine", "prompts=[one,two]"],
]
VALUES = [
    "", "null", "none", "true", "false", "yes", "auto", "'auto'", "0", "1", "-1", "1.5", "2e8", "1e400", "-0.0",
    "nan", "inf", "-inf", "10000000000000000000000000000", "0x1f", "1_000", "007", "[]", "{}", "[1,2]",
    "[[],{}]", "[null]", "{a:1}", "{a:{b:[c]}}", "{1:2}", "''", '"x"', "'a b'", "a b", "a=b", "a,b",
    "choice(1,2)", "range(3)", "glob(*)", "???", "'???'", "${trainer.seed}", "${nothing}",
    "${oc.env:NOT_SET_ANYWHERE}", "${kit.dir:cache}", "${kit.dir:nothing}", "${", "$", "~", "/", ".", "..",
    "../../x", "~nobody/x", "/dev/null", "/proc/self/mem", "x.json", "x.yaml", "2024-01-01", "!!int 3", "#",
    "\\", "'", '"', "[", "]", "{", "}", "(", ":", "a:b", "@", "%", "&", "*", "\n", "\t", "\0", "a\0b", "\ud800",
    "é", "日本", "\u202e", "🙂", "x" * 5000, "[" * 200 + "]" * 200, "_target_", "int(3)", "str([1])",
]  # fmt: skip
KEYS = [
    "", ".", "..", "a", "trainer.", ".trainer", "trainer..seed", "hydra.run.dir", "hydra", "_target_",
    "trainer._target_", "model", "model.config", "trainer", "peft", "peft.peft_type", "deepspeed.file",
    "deepspeed.zero_optimization", "launch", "dataset.columns", "dataset.columns.text", "tracking.report_to",
    "fsdp.fsdp_version", "name", "prompts", "defaults", "é", "deepspeed.optimizer.type",
    "deepspeed.scheduler.type", "deepspeed.scheduler", "quantization", "recipe", "tokenizer",
    "trainer.model_init_kwargs.device_map", "model.revision", "tokenizer.chat_template", "dataset.eval_path",
    "__class__", "launch.script", "runs_dir", "trainer.optim", "deepspeed.fp16", "deepspeed.bf16.enabled", "1",
    "trainer[0]", "a b", "{}",
]  # fmt: skip
JUNK = [b"", b"{", b"}", b"[", b"\xff", b"\0", b": ", b"\n", b"&a *a", b"1e999", b'"', b"null", b"!!python/x "]
GROUPS = ["model", "dataset", "peft", "deepspeed", "trainer", "launch", "recipe", "fsdp"]
CHARACTERS = "abcxyzABC0189 _-.=+~@/:,'\"[]{}()$#%\\\n\téß日🙂\u200b\0"


def spoil(rng: random.Random, given: list[str]) -> list[str]:
    """A valid list of overrides with one to three things wrong in it."""
    args = list(given) or ["trainer.max_steps=7"]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(args))
        key, _, value = args[at].partition("=")
        if (what := rng.choice(list(SPOILERS))) == "file":
            args.insert(0, "\0file")  # spoiled_file() writes one in its place
        else:
            args[at : at + 1] = SPOILERS[what](rng, key, value)
        args = args or ["trainer.max_steps=7"]
    return args


def renamed(rng: random.Random, key: str, value: str) -> list[str]:
    at = rng.randrange(len(key) + 1)
    end = min(len(key), at + rng.randrange(3))
    return [f"{key[:at]}{rng.choice(CHARACTERS) * rng.randrange(3)}{key[end:]}={value}"]


def scrambled(rng: random.Random, key: str, value: str) -> list[str]:
    return [f"{key}={''.join(rng.choices(CHARACTERS, k=rng.randrange(1, 20)))}"]


def nested(rng: random.Random, key: str, value: str) -> list[str]:
    """A random tree where a value or a whole section was."""
    place = rng.choice([key, key.split(".")[0], rng.choice(KEYS)])
    return [f"++{place}={flow(tree(rng, 3))}"]


def number(rng: random.Random, key: str, value: str) -> list[str]:
    return [f"{key}={rng.choice([0, -1, -7, 2**31, 2**63, 10**30, 1e-300, 1e308, -1.5, 0.5, 3.0000001])}"]


def prefixed(rng: random.Random, key: str, value: str) -> list[str]:
    return [rng.choice(["+", "++", "~", "+++", "~~", "-", "--", "@", "hydra/", "override ", " "]) + f"{key}={value}"]


SPOILERS: dict[str, Callable[[random.Random, str, str], list[str]]] = {
    "rename": renamed,
    "retype": lambda rng, key, value: [f"{key}={rng.choice(VALUES)}"],
    "other key": lambda rng, key, value: [f"{rng.choice(KEYS)}={rng.choice([value, rng.choice(VALUES)])}"],
    "number": number,
    "scramble": scrambled,
    "nested": nested,
    "prefix": prefixed,
    "drop": lambda rng, key, value: [],
    "delete": lambda rng, key, value: [f"~{rng.choice([key, *KEYS])}"],
    "twice": lambda rng, key, value: [f"{key}={value}", f"{key}={rng.choice(VALUES)}"],
    "bare": lambda rng, key, value: [rng.choice([key, value, *VALUES])],
    "group": lambda rng, key, value: [f"{rng.choice(GROUPS)}={rng.choice(VALUES)}"],
    "file": lambda rng, key, value: [],
}


def tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind >= 6:
        return {rng.choice([*KEYS[1:], "zero_optimization", "path", "seed"]): tree(rng, depth - 1) for _ in "ab"}
    if kind == 5:
        return [tree(rng, depth - 1) for _ in range(rng.randrange(3))]
    return rng.choice([None, True, -1, 2.5, 1e30, "auto", "x", "", "é\n'", "${nothing}", "???"])


def flow(value: Any) -> str:
    """A tree in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"'{k}':{flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return "'" + value.replace("'", "\\'") + "'"
    return json.dumps(value)


def spoiled_file(rng: random.Random, folder: Path) -> str:
    """A run.yaml, a DeepSpeed JSON, a data file or a config.json with something wrong in it, as an override."""
    kind = rng.choice(["run.yaml", "ds.json", "rows.jsonl", "config.json", "model"])
    good = {
        "run.yaml": "recipe: quickstart\ndeepspeed: zero2\npeft:\n  r: 8\ntrainer:\n  max_steps: 3\n",
        "ds.json": '{"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}, "bf16": {}}',
        "rows.jsonl": '{"text": "a b c"}\n{"text": "d"}\n',
        "config.json": '{"model_type": "llama", "hidden_size": 32, "text_config": {"hidden_size": 8}}',
        "model": '{"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
    }[kind]
    raw = bytearray(good.encode())
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.randrange(4)] = rng.choice(JUNK)
    if rng.random() < 0.3:
        raw = bytearray(json.dumps(tree(rng, 4)).encode())
    path = folder / kind
    if kind in ("config.json", "model"):
        path = folder / "model"
        path.mkdir(exist_ok=True)
        good_config = b'{"model_type": "llama", "hidden_size": 32}'
        (path / "config.json").write_bytes(raw if kind == "config.json" else good_config)
        header = bytes(raw) if kind == "model" else b"{}"
        (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        return f"model.name_or_path={path}"
    path.write_bytes(raw)
    return {"run.yaml": str(path), "ds.json": f"deepspeed={path}"}.get(kind, f"dataset.path={path}")


def make_inputs(folder: Path) -> list[str]:
    """A model and a data set that pass the checks, made without torch; as overrides."""
    model = folder / "base"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    names = [f"model.layers.0.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    header = json.dumps(
        {n: {"dtype": "F32", "shape": [4, 4], "data_offsets": [64 * i, 64 * i + 64]} for i, n in enumerate(names)}
    ).encode()
    data = header + bytes(64 * len(names))
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + data)
    vocabulary = {"model": {"vocab": {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}}, "added_tokens": []}
    (model / "tokenizer.json").write_text(json.dumps(vocabulary))
    settings = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "chat_template": "{% generation %}{{ messages }}{% endgeneration %}",
    }
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = folder / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text((json.dumps(row) + "\n") * 8)
    return [f"model.name_or_path={model}", f"dataset.path={rows}"]


def outcome(args: list[str]) -> tuple[str, str]:
    """("valid" | "refused" | "crashed", details). A valid plan must also survive the way to disk and back."""
    from kit import api
    from kit.errors import KitError
    from kit.schema.run_plan import RunPlan

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        plan = api.compose(*args)
        again = RunPlan.model_validate_json(plan.to_json().encode())
        if again != plan:
            return "crashed", "plan.json does not hold the plan"
        return "valid", ""
    except TimeoutError:
        return "crashed", f"took longer than {LIMIT} s\n{traceback.format_exc()}"
    except KitError as error:
        if not error.problems:
            return "crashed", "refused without a problem"
        text = "\n".join(map(str, error.problems))
        json.dumps(error.to_json())
        return ("crashed", f"a problem shows a traceback: {text}") if "Traceback" in text else ("refused", text)
    except Exception:
        return "crashed", traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutations(n: int, seed: int, folder: Path):
    """`n` spoiled command lines, the same for the same seed (the files in `folder` are written as it goes)."""
    stock = make_inputs(folder)
    for number in range(n):
        rng = random.Random(f"{seed} {number}")
        given = rng.choice(VALID)
        front = [] if any(o.startswith("recipe=") for o in given) else stock
        args = [a if a != "\0file" else spoiled_file(rng, folder) for a in spoil(rng, given)]
        yield [*front, *args]


def fuzz(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of outcomes, and every crash with its command line and its last frame."""
    counts: Counter[str] = Counter()
    crashes: dict[str, dict[str, Any]] = {}
    begun, here = time.monotonic(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for args in mutations(n, seed, Path(folder)):
                verdict, details = outcome(args)
                counts[verdict] += 1
                if verdict == "crashed":
                    lines = [line.strip() for line in details.strip().splitlines()]
                    frame = next((line for line in reversed(lines) if re.match("File .*/kit/", line)), "")
                    kind = f"{lines[-1][:120]} | {frame.partition(', in ')[0][-80:]}"
                    first = {"times": 0, "args": [a[:300] for a in args], "traceback": details[-3000:]}
                    entry = crashes.setdefault(kind, first)
                    entry["times"] += 1
                    if entry["times"] == 1:
                        out(f"crashed: {kind}")
        finally:
            os.chdir(here)
    seconds = time.monotonic() - begun
    return {"mutations": n, "seed": seed, "seconds": round(seconds, 1), "counts": dict(counts), "crashes": crashes}


def honour(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of verdicts, and the first mutation of each kind that was neither refused by name nor honoured."""
    import mutate

    counts: Counter[str] = Counter()
    crashes: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base, data = inputs(Path(folder))
        runs = mutate.valid_runs(base, data)
        for number in range(n):
            rng = random.Random(f"{seed} {number}")
            run = rng.choice(runs)
            key, value = mutate.mutation(rng, run.tree)
            verdict, details = mutate.judge(run, key, value)
            counts[verdict] += 1
            if verdict not in ("refused", "honoured"):
                counts["failures"] += 1
                if crashes.setdefault(f"{verdict} {key}", {"value": repr(value), "details": details[-2000:]}):
                    out(f"{verdict}: {key}={value!r}")
    seconds = time.monotonic() - begun
    return {"mutations": n, "seed": seed, "seconds": round(seconds, 1), "counts": dict(counts), "crashes": crashes}


# ------------------------------------------------------------------------------------------------------------ data

OPTIONS = [  # of the data set, in turn
    {},
    {"roles": {"tool": "user", "critic": "assistant"}},
    {"columns": {"system": "input"}},
]
TRAIN_ON = {  # and of the loss
    "messages": ["everything", "assistant_turns", "last_turn", "chosen_turns"],
    "prompt_completion": ["completion", "everything"],
}
ODD: list[Any] = [
    None, True, 0, -1, 1.5, 2**70, math.nan, "", " ", "x", "the pain in head", "half \ud83d of it", "a\0b", "</s>",
    "<|assistant|> ", "[]", "{}", "[{}]", '[{"role": "user", "content": "a"}]', '{"name": "f"}', "{{ x }}", "\u2028",
    "user", "assistant", "system", "tool", "critic", "gpt", "function_call", [], {}, [None], [[]], [{}], [1, 2, -100],
    [0, 1, 1], {"role": "assistant", "content": "yes"}, {"from": "gpt", "value": "no"}, [["a", "b"]], "a" * 5000,
]  # fmt: skip
NAMES = [
    "messages", "conversations", "role", "from", "content", "value", "tool_calls", "function_call", "function", "name",
    "arguments", "weight", "train_detail", "reasoning", "tools", "chat_template_kwargs", "images", "system", "history",
    "prompt", "completion", "text", "instruction", "input", "output", "question", "answer", "input_ids", "labels",
    "attention_mask", "completion_mask", "chosen", "rejected", "id", "",
]  # fmt: skip


def spoiled_row(rng: random.Random, good: Any) -> Any:
    """A good row with none to four things in it changed, added or taken out."""
    row = json.loads(json.dumps(good))
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        places = list(inner_places(row))
        holder, key = rng.choice(places) if places else (row, None)
        odd = json.loads(json.dumps(rng.choice(ODD)))
        what = rng.randrange(5)
        if what == 0 and isinstance(holder, dict):
            holder[rng.choice(NAMES)] = odd
        elif what == 1 and isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), odd)
        elif what == 2 and key is not None:
            del holder[key]
        elif what == 3 and isinstance(holder, dict) and key is not None:
            holder[rng.choice(NAMES)] = holder.pop(key)
        elif key is not None:
            holder[key] = odd
    return rng.choice(ODD) if rng.random() < 0.01 else row


def inner_places(value: Any):
    """(holder, key or index) of everything inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from inner_places(inner)


def spoiled_line(rng: random.Random, good: Any) -> bytes:
    line = bytearray(json.dumps(spoiled_row(rng, good), ensure_ascii=rng.random() < 0.3).encode(errors="replace"))
    if rng.random() < 0.02:
        at = rng.randrange(len(line))
        line[at : at + rng.randrange(4)] = rng.choice([junk for junk in JUNK if junk != b"\n"])
    return bytes(line) or b"0"


def data(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of rows that were encoded, refused with a reason, lost, or ended in another exception; the reasons."""
    import tiny
    from rows.test_formats import GOOD

    from kit.data import load, prepare
    from kit.data.encode import make_encoding
    from kit.rows.files import read_rows
    from kit.rows.formats import FORMATS, row_kind
    from kit.schema.run_plan import DataSource

    counts: Counter[str] = Counter(encoded=0, refused=0, lost=0, crashed=0)
    reasons: Counter[str] = Counter()
    crashes: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    of = {f: [row for name, row, _ in GOOD.values() if name == f.replace("alpaca_prompt", "alpaca")] for f in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny.make_tokenizer(folder)
        encoding = make_encoding(tokenizer, max_length=64)
        file = Path(folder, "rows.jsonl")
        batch = min(prepare.BATCH, -(-n // len(FORMATS)))
        for turn, first in enumerate(range(0, n, batch)):
            rng = random.Random(f"{seed} {first}")
            form = list(FORMATS)[turn % len(FORMATS)]
            source = DataSource(path=str(file), format=form, **rng.choice(OPTIONS))
            train_on = rng.choice(TRAIN_ON.get(row_kind(form, {}), ["everything"]))
            long = rng.choice(["truncate", "split", "drop"])
            own = replace(encoding, train_on=train_on, on_long_row=long)
            preparation = prepare.Preparation(tokenizer, [source], [own], frozenset({tokenizer.eos_token_id}))
            size = min(batch, n - first)
            lines = [spoiled_line(rng, rng.choice(of[form])) for _ in range(size)]
            file.write_bytes(b"\n".join(lines) + b"\n")
            alone = []
            for number, record in enumerate(load._records([file], read_rows, 0)):
                try:
                    pieces, counted, bad = prepare.encode_records([record], preparation)
                    alone += pieces
                    kept = counted["kept"] == 1 and pieces and all(p.trained for p in pieces) and not bad
                    refused = counted["kept"] == 0 and not pieces and [b["number"] for b in bad] == [number + 1]
                    verdict = "encoded" if kept else "refused" if refused and bad[0]["problem"] else "lost"
                    reasons.update(prepare.reason_of(b) for b in bad)
                except Exception:
                    verdict = "crashed"
                counts[verdict] += 1
                if verdict in ("lost", "crashed"):
                    what = traceback.format_exc().strip() if verdict == "crashed" else f"lost as {form}"
                    if what.splitlines()[-1] not in crashes:
                        out(f"{verdict}: {what.splitlines()[-1]}")
                    entry = {"format": form, "row": lines[number][:2000].decode(errors="replace"), "traceback": what}
                    crashes.setdefault(what.splitlines()[-1], entry)
            records = list(load._records([file], read_rows, 0))
            counts["lost"] += abs(size - len(records))
            if not counts["crashed"] and prepare.encode_records(records, preparation)[0] != alone:
                counts["lost"] += 1
                out(f"the rows from {first} are others among each other than alone")
    counts["failures"] = counts["lost"]
    seconds = round(time.monotonic() - begun, 1)
    summed = dict(reasons.most_common(40))
    return {"rows": n, "seed": seed, "seconds": seconds, "counts": dict(counts), "reasons": summed, "crashes": crashes}


# ------------------------------------------------------------------------------------------------- kill and resume


AIMS = ["any", "save", "early", "any", "save"]  # taken in turn


def inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny model and 96 chats."""
    import tiny
    from conftest import write_rows

    return tiny.make_model(folder / "base"), write_rows(folder / "chat.jsonl", tiny.chat_rows(96))


def description(base: Path, data: Path, runs: Path, steps: int) -> list[str]:
    """One process that saves every 2 steps and keeps 3 checkpoints, so that old ones are deleted all the time."""
    from launch import harness

    more = ["launch=local", "trainer.save_steps=2", "trainer.save_total_limit=3", f"trainer.max_steps={steps}"]
    more += ["trainer.eval_strategy=no", "trainer.load_best_model_at_end=false"]
    return harness.overrides(base, data, runs, *more)


def kill_tree(process: Any, rng: random.Random) -> None:
    """SIGKILL to the command and everything below it, in any order."""
    import psutil

    with contextlib.suppress(psutil.Error):
        top = psutil.Process(process.pid)
        tree = [top, *top.children(recursive=True)]
        rng.shuffle(tree)
        for one in tree:
            with contextlib.suppress(psutil.Error):
                one.kill()
    process.communicate()


def saves(run: Path | None) -> list[str]:
    """Names in the checkpoint folder, unfinished ones too."""
    folder = run / "checkpoints" if run else None
    return sorted(p.name for p in folder.iterdir() if "checkpoint-" in p.name) if folder and folder.is_dir() else []


def unfinished(run: Path | None) -> list[str]:
    return [name for name in saves(run) if name.startswith(".")]


def run_in(runs: Path) -> Path | None:
    return next((p.parent for p in runs.glob("*/plan.json")), None)


def newest_step(run: Path | None) -> tuple[int | None, list[str]]:
    """The step that a resume would start from, not only by the kit itself; AssertionError if unsound."""
    from kit.storage import manifest, safetensors_header

    newest = manifest.newest_complete_checkpoint(run / "checkpoints") if run else manifest.NewestCheckpoint(None, [])
    if newest.path is None:
        return None, newest.skipped
    assert re.fullmatch(r"checkpoint-\d+", newest.path.name), newest.path
    assert manifest.verify_folder(newest.path) == []
    step = int(newest.path.name.partition("-")[2])
    assert json.loads((newest.path / "trainer_state.json").read_text())["global_step"] == step
    tensors = [t for f in newest.path.glob("*.safetensors") for t in safetensors_header.read_header(f)]
    assert tensors, "a checkpoint without tensors"
    return step, newest.skipped


def one_kill(work: Path, base: Path, data: Path, rng: random.Random, aim: str, startup: float) -> dict[str, Any]:
    """Start, kill at a random moment, look, resume; what was found. AssertionError where it is not as promised."""
    from launch import harness

    runs = work / "runs"
    args = [sys.executable, "-m", "kit", "train", *description(base, data, runs, 1000)]
    begun = time.monotonic()
    process = harness.start(args, work)
    if aim == "early":
        time.sleep(rng.uniform(0.2, 0.8 * startup))
    else:
        harness.wait_for(lambda: saves(run_in(runs)), 120, process)
        startup = time.monotonic() - begun
        time.sleep(rng.uniform(0, 4))
    if aim == "save":  # saves are short: most kills at random moments miss them
        run, until = run_in(runs), time.monotonic() + 10
        while not unfinished(run) and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(rng.choice([0, rng.uniform(0, 0.02), rng.uniform(0, 0.1)]))
    kill_tree(process, rng)
    run = run_in(runs)
    found: dict[str, Any] = {
        "after": round(time.monotonic() - begun, 2),
        "startup": round(startup, 2),
        "aim": aim,
        "left": saves(run),
    }
    if run is None:
        return found | {"newest": None, "resumed": False}
    harness.assert_nothing_left(run)
    step, skipped = newest_step(run)
    found |= {"newest": step, "passed_over": skipped}
    goal = (step or 0) + 4
    done = harness.kit("resume", str(run), f"trainer.max_steps={goal}", cwd=work)
    if step is None:
        assert done.returncode == 2 and "no complete checkpoint" in done.stderr, done.stderr[-2000:]
        return found | {"resumed": False}
    assert done.returncode == 0, done.stderr[-3000:]
    assert harness.status(run).get("step") == goal, harness.status(run)
    assert set(range(step + 1, goal + 1)) <= harness.rows(run).keys()
    assert not unfinished(run), saves(run)
    assert not adapter_problems(run)
    return found | {"resumed": True}


def adapter_problems(run: Path) -> list[str]:
    from kit.storage import manifest

    return manifest.verify_folder(run / "adapter")


def kill(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of what `n` kills left behind, and the failures."""
    kills: list[dict[str, Any]] = []
    startup, begun = 10.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base, data = inputs(Path(folder))
        for number in range(n):
            work = Path(folder, str(number))
            work.mkdir()
            try:
                aim = AIMS[number % len(AIMS)]
                one = one_kill(work, base, data, random.Random(f"{seed} {number}"), aim, startup)
                startup = one["startup"]
            except AssertionError as error:
                one = {"failure": str(error)[-3000:]}
            kills.append(one)
            out(f"kill {number + 1}: {one}")
            shutil.rmtree(work, ignore_errors=True)
    counts = {
        "before the run directory or the first checkpoint": sum(k.get("newest", 0) is None for k in kills),
        "with a complete checkpoint": sum(k.get("newest", None) is not None for k in kills),
        "in the middle of a save or a deletion": sum(any(n.startswith(".") for n in k.get("left", [])) for k in kills),
        "with damaged checkpoints passed over": sum(bool(k.get("passed_over")) for k in kills),
        "resumed": sum(k.get("resumed", False) for k in kills),
        "failures": sum("failure" in k for k in kills),
    }
    return {"kills": n, "seed": seed, "seconds": round(time.monotonic() - begun, 1), "counts": counts, "each": kills}


def resume(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """One run killed `n` times against the same run left alone: losses by step, and the adapter's bytes."""
    from launch import harness

    rng, begun, steps = random.Random(seed), time.monotonic(), 40 + 40 * n
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base, data = inputs(work)
        alone = harness.kit("train", *description(base, data, work / "alone", steps), cwd=work)
        assert alone.returncode == 0, alone.stderr[-3000:]
        argv, stops, run = ["train", *description(base, data, work / "killed", steps)], [], None
        for _ in range(n):
            before = stops[-1] if stops else 0
            process = harness.start([sys.executable, "-m", "kit", *argv], work)

            def moved_on(before: int = before) -> bool:
                return (newest_name(run_in(work / "killed")) or 0) > before

            harness.wait_for(moved_on, 120, process)
            time.sleep(rng.uniform(0, 1.5))
            kill_tree(process, rng)
            run = run_in(work / "killed")
            step, _ = newest_step(run)
            stops.append(step)
            argv = ["resume", str(run)]
            out(f"killed, resuming from step {step} of {steps}")
        done = harness.kit(*argv, cwd=work)
        assert done.returncode == 0, done.stderr[-3000:]
        one, other = harness.the_run(work / "alone"), harness.the_run(work / "killed")
        losses, killed = harness.rows(one), harness.rows(other)
        differ = max(abs(losses[s] - killed.get(s, math.inf)) for s in losses)
        same = [(r / "adapter" / "adapter_model.safetensors").read_bytes() for r in (one, other)]
    counts = {
        "steps": len(losses),
        "largest loss difference": differ,
        "same adapter bytes": same[0] == same[1],
    }
    counts["failures"] = int(differ > 1e-6 or same[0] != same[1])
    return {
        "kills": n,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "counts": counts,
        "stopped_at": stops,
    }


# ------------------------------------------------------------------------------------------------------------ nvme


def nvme(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of `n` launches with parameters and optimizer on a disk, and those whose losses are not ZeRO-1's."""
    import conftest

    from launch import test_ds_configs as configs

    begun, counts = time.monotonic(), Counter(launches=n, failures=0)
    ops = conftest.compile_operators([*conftest.OPERATORS[:2], "async_io"])
    for _ in range(n):
        with tempfile.TemporaryDirectory() as folder:
            ranks = configs.launch(ops, Path(folder), ["zero1", configs.NVME])
        for losses in ranks:
            pairs = zip(losses["zero1"], losses[configs.NVME], strict=True)
            if len(losses["zero1"]) != 3 or not all(abs(a - b) <= configs.CLOSE for a, b in pairs):
                counts["failures"] += 1
                out(f"{losses}")
    return {"launches": n, "seconds": round(time.monotonic() - begun, 1), "counts": dict(counts), "losses": ranks[0]}


# ----------------------------------------------------------------------------------------------------------- slurm


def slurm(n: int, seed: int, out: Callable[[str], None] = print) -> dict[str, Any]:
    """Counts of `n` jobs that were interrupted twice each, and the failures; nothing where there can be no SLURM."""
    from launch import cluster

    if reason := cluster.missing():
        return {"jobs": 0, "seed": seed, "seconds": 0.0, "counts": {"failures": 0}, "skipped": reason}
    begun, jobs, home = time.monotonic(), [], Path(tempfile.mkdtemp())
    try:
        base, data = inputs(home)
        with cluster.running(home / "cluster") as env:
            jobs_env = {**env, "KIT_TEST_STEP": "0.4"}
            wanted = interrupted(home / "alone", base, data, jobs_env, [])
            for number in range(n):
                rng = random.Random(f"{seed} {number}")
                steps = [rng.randrange(2, 9), rng.randrange(11, 17)]  # a stop takes effect a step or two later
                try:
                    one = interrupted(home / str(number), base, data, jobs_env, steps)
                    same = {key: one[key] == wanted[key] for key in ("losses", "adapter")}
                    assert all(same.values()), f"not as a run left alone: {same}"
                    one = {"interrupted_at": steps, "restarts": one["restarts"], "seconds": one["seconds"]}
                except AssertionError as error:
                    one = {"interrupted_at": steps, "failure": str(error)[-3000:]}
                jobs.append(one)
                out(f"job {number + 1}: {one}")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    counts = {"completed": sum("failure" not in j for j in jobs), "failures": sum("failure" in j for j in jobs)}
    return {"jobs": n, "seed": seed, "seconds": round(time.monotonic() - begun, 1), "counts": counts, "each": jobs}


def interrupted(work: Path, base: Path, data: Path, env: dict[str, str], steps: list[int]) -> dict[str, Any]:
    """One job to its end: at the first of `steps` signalled as before a time limit, at the second one preempted."""
    import subprocess

    from launch import harness

    def ask(*argv: str) -> str:
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True).stdout

    def until(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (ask("scontrol", "show", "job", "-o", job), log.read_text()[-2000:])
            time.sleep(0.1)

    def holds(*words: str) -> Callable[[], bool]:
        return lambda: log.exists() and all(word in log.read_text() for word in words)

    work.mkdir()
    begun = time.monotonic()
    own = ["launch=slurm", f"launch.script={ROOT / 'tests/launch/slow.py'}", "launch.slurm.cpus_per_task=2"]
    done = harness.kit("train", *harness.overrides(base, data, work / "runs", *own), cwd=work, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    job, run = done.stdout.split()[1].strip(":"), harness.the_run(work / "runs")
    log = run / "logs" / f"slurm-{job}.out"
    for number, step in enumerate(steps, 1):
        until(holds(f"step {step}/"), 300)
        if number == 1:
            ask("scancel", "--batch", "--signal=USR1", job)
        else:
            ask("sbatch", "--partition=urgent", "--cpus-per-task=2", f"--output={work}/urgent.out", "--wrap=sleep 1")
        until(holds(f"queued again, start {number} of"), 60)
    until(lambda: f"JobId={job} " in (text := ask("scontrol", "show", "job", "-o", job))
          and any(f"JobState={s}" in text for s in ("COMPLETED", "FAILED", "CANCELLED")), 400)  # fmt: skip
    text = ask("scontrol", "show", "job", "-o", job)
    assert "JobState=COMPLETED" in text and harness.status(run)["state"] == "done", text
    restarts = int(re.findall(r"Restarts=(\d+)", text)[0])
    assert restarts == len(steps), text
    harness.assert_nothing_left(run)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    seconds = round(time.monotonic() - begun, 1)
    return {"losses": harness.rows(run), "adapter": adapter, "restarts": restarts, "seconds": seconds}


def newest_name(run: Path | None) -> int | None:
    """The highest step among finished names; cheap, for polling."""
    return max((int(n.partition("-")[2]) for n in saves(run) if re.fullmatch(r"checkpoint-\d+", n)), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(COUNTS), action="append")
    parser.add_argument(
        "--n", type=int, help=f"how many, of each ({', '.join(f'{k} {v}' for k, v in COUNTS.items())})"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    import conftest  # noqa: F401  the suite's environment: own cache, offline, CPU
    from benchmarks.cli_latency import machine

    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    campaigns = {
        "fuzz": fuzz,
        "honour": honour,
        "data": data,
        "kill": kill,
        "resume": resume,
        "nvme": nvme,
        "slurm": slurm,
    }
    failed = 0
    for name in a.only or COUNTS:
        result[name] = campaigns[name](a.n or COUNTS[name], a.seed)
        counts = result[name]["counts"]
        failed += counts.get("crashed", 0) + counts.get("failures", 0)
        print(f"{name}: {counts} in {result[name]['seconds']} s", flush=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
