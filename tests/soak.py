"""Campaigns that are too long for the suite; `make soak`. A small instance of each is in the suite.

    python tests/soak.py [--only fuzz|kill|resume] [--n N] [--seed S] --out FILE

fuzz    N spoiled command lines and files through the checks: a plan or a list of problems, never another exception.
kill    N runs that save every 2 steps, each killed (SIGKILL, the whole tree) at a random moment: what is found then is
        nothing or a complete checkpoint, and `kit resume` goes on from it.
resume  one run killed N times and resumed until it is done: losses and adapter are those of a run left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

COUNTS = {"fuzz": 2000, "kill": 20, "resume": 5}

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
    ["global_batch_size=32", "trainer.per_device_train_batch_size=4"],
    ["trainer.lr_scheduler_kwargs={min_lr: 1.0e-6}", "trainer.lr_scheduler_type=cosine_with_min_lr"],
    ["quantization.load_in_4bit=true", "quantization.bnb_4bit_quant_type=nf4"],
    ["recipe=quickstart", "peft.r=4", "launch.num_gpus=2", "launch=deepspeed", "deepspeed=zero3"],
    ["launch.master_port=29500", "runs_dir=elsewhere", "name=mine", "prompts=[one,two]"],
]
VALUES = [
    "", "null", "none", "true", "false", "yes", "auto", "'auto'", "0", "1", "-1", "1.5", "2e8", "1e400", "-0.0", "nan", "inf",
    "-inf", "10000000000000000000000000000", "0x1f", "1_000", "007", "[]", "{}", "[1,2]", "[[],{}]", "[null]", "{a:1}",
    "{a:{b:[c]}}", "{1:2}", "''", '"x"', "'a b'", "a b", "a=b", "a,b", "choice(1,2)", "range(3)", "glob(*)", "???", "'???'",
    "${trainer.seed}", "${nothing}", "${oc.env:NOT_SET_ANYWHERE}", "${kit.dir:cache}", "${kit.dir:nothing}", "${", "$", "~",
    "/", ".", "..", "../../x", "~nobody/x", "/dev/null", "/proc/self/mem", "x.json", "x.yaml", "2024-01-01", "!!int 3", "#",
    "\\", "'", '"', "[", "]", "{", "}", "(", ":", "a:b", "@", "%", "&", "*", "\n", "\t", "\0", "a\0b", "\ud800", "é", "日本",
    "\u202e", "🙂", "x" * 5000, "[" * 200 + "]" * 200, "_target_", "int(3)", "str([1])",
]  # fmt: skip
KEYS = [
    "", ".", "..", "a", "trainer.", ".trainer", "trainer..seed", "hydra.run.dir", "hydra", "_target_", "trainer._target_",
    "model", "model.config", "trainer", "peft", "peft.peft_type", "deepspeed.file", "deepspeed.zero_optimization", "launch",
    "dataset.columns", "dataset.columns.text", "tracking.report_to", "fsdp.fsdp_version", "name", "prompts", "defaults", "é",
    "deepspeed.optimizer.type", "deepspeed.scheduler.type", "deepspeed.scheduler", "quantization", "recipe", "tokenizer",
    "trainer.model_init_kwargs.device_map", "model.revision", "tokenizer.chat_template", "dataset.eval_path", "__class__",
    "launch.script", "runs_dir", "trainer.optim", "deepspeed.fp16", "deepspeed.bf16.enabled", "1", "trainer[0]", "a b", "{}",
]  # fmt: skip
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
    "group": lambda rng, key, value: [
        f"{rng.choice(['model', 'dataset', 'peft', 'deepspeed', 'trainer', 'launch', 'recipe', 'fsdp'])}={rng.choice(VALUES)}"
    ],
    "file": lambda rng, key, value: [],
}


def tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8 if depth else 5)
    if kind >= 6:
        return {rng.choice([k for k in KEYS if k] + ["zero_optimization", "path", "seed"]): tree(rng, depth - 1) for _ in "ab"}
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
        "ds.json": '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "fp16": {"enabled": "auto"}}',
        "rows.jsonl": '{"text": "a b c"}\n{"text": "d"}\n',
        "config.json": '{"model_type": "llama", "hidden_size": 32, "text_config": {"hidden_size": 8}}',
        "model": '{"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
    }[kind]
    raw = bytearray(good.encode())
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(raw) + 1)
        junk = rng.choice([b"", b"{", b"}", b"[", b"\xff", b"\0", b": ", b"\n", b"&a *a", b"1e999", b'"', b"null", b"!!python/x "])
        raw[at : at + rng.randrange(4)] = junk
    if rng.random() < 0.3:
        raw = bytearray(json.dumps(tree(rng, 4)).encode())
    path = folder / kind
    if kind in ("config.json", "model"):
        path = folder / "model"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_bytes(raw if kind == "config.json" else b'{"model_type": "llama", "hidden_size": 32}')
        header = bytes(raw) if kind == "model" else b"{}"
        (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        return f"model.name_or_path={path}"
    path.write_bytes(raw)
    return {"run.yaml": str(path), "ds.json": f"deepspeed={path}"}.get(kind, f"dataset.path={path}")


def make_inputs(folder: Path) -> list[str]:
    """A model and a data set that pass the checks, made without torch; as overrides."""
    model = folder / "base"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 4, "architectures": ["LlamaForCausalLM"]}')
    names = [f"model.layers.0.self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    header = json.dumps(
        {n: {"dtype": "F32", "shape": [4, 4], "data_offsets": [64 * i, 64 * i + 64]} for i, n in enumerate(names)}
    ).encode()
    data = header + bytes(64 * len(names))
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + data)
    rows = folder / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows.write_text((json.dumps(row) + "\n") * 8)
    return [f"model.name_or_path={model}", f"dataset.path={rows}"]


def outcome(args: list[str]) -> tuple[str, str]:
    """("valid" | "refused" | "crashed", details). A valid plan must also survive the way to disk and back."""
    from kit import api
    from kit.config.schema import RunPlan
    from kit.errors import KitError

    try:
        plan = api.compose(*args)
        again = RunPlan.model_validate_json(plan.to_json().encode())
        if again != plan:
            return "crashed", "plan.json does not hold the plan"
        return "valid", ""
    except KitError as error:
        if not error.problems:
            return "crashed", "refused without a problem"
        text = "\n".join(map(str, error.problems))
        json.dumps(error.to_json())
        return ("crashed", f"a problem shows a traceback: {text}") if "Traceback" in text else ("refused", text)
    except Exception:
        return "crashed", traceback.format_exc()


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
                    lines = details.strip().splitlines()
                    frame = next((line.strip() for line in reversed(lines) if line.strip().startswith("File") and "kit" in line), "")
                    kind = f"{lines[-1][:120]} | {frame.partition(', in ')[0][-80:]}"
                    entry = crashes.setdefault(kind, {"times": 0, "args": [a[:300] for a in args], "traceback": details[-3000:]})
                    entry["times"] += 1
                    if entry["times"] == 1:
                        out(f"crashed: {kind}")
        finally:
            os.chdir(here)
    seconds = time.monotonic() - begun
    return {"mutations": n, "seed": seed, "seconds": round(seconds, 1), "counts": dict(counts), "crashes": crashes}
