"""Wrong, odd and border values of every field of the libraries' classes: what check says, and what becomes of them.

    python tests/field_values.py [--seed S] [--per-field N] [--runs 300] [--only TABLE,...] [--rows FILE] [--out FILE]

The fields are those of SFTConfig, of every PEFT config, of BitsAndBytesConfig and of DeepSpeed's JSON. A value is
written into a valid run on a tiny Llama, and judged by the kit (`check`), then by the library: its constructor; an
adapter is also put on the base and stepped twice; and a seeded sample goes through the worker itself, which loads,
builds the trainer, trains two steps, evaluates and saves in a process of its own. The outcomes:

early     check refuses it, and so does the constructor
refused   check refuses it, and the constructor takes it: most are of a wrong type, which no constructor looks at
late      check accepts it, and a constructor, loading, the trainer or what comes before the first step fails
step      check accepts it, and a step, an evaluation or a save fails
silent    check accepts it without a word, and the value is lost on the way, or nothing is trained
fine      check accepts it, and it trains
accepted  check accepts it, and so does the constructor; not among the sample that is trained
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from kit.config.compose import Composed, compose  # noqa: E402
from kit.config.plan import build_plan  # noqa: E402
from kit.errors import KitError  # noqa: E402
from kit.schema import fields  # noqa: E402
from kit.schema.run_plan import RunPlan  # noqa: E402

LIMIT, WAIT = 20, 300  # seconds of CPU, and of any clock, that a run of two steps may take
MEMORY = 6 * 2**30
HUGE = [2**31, 2**63, 10**30, 1e-300, 1e308]
OF_KIND: dict[str, list[Any]] = {
    "bool": [True, False],
    "int": [0, 1, 2, 3, 5, 7, -1, -7, *HUGE[:2], 64],
    "float": [0.0, 1.0, 0.5, 0.1, 1.5, -0.5, -1.0, 1e-8, *HUGE[3:], 100.0],
    "str": ["", " ", "word", "None", "/no/such/file"],
    "list": [[], [""], ["no_such_module"], ["q_proj"], [0], [-1], [0, 99], [[0, 1]], [0.5, 1.5], ["q_proj", "q_proj"]],
    "dict": [{}, {"a": 1}, {"q_proj": 2}, {"no_such_module": 2}, {"q_proj": 0}, {"q_proj": "x"}, {"": None}],
    "none": [None],
}
WRONG: list[Any] = [True, 1, 0, -1, 1.5, "word", "", "1", "auto", None, [], ["a"], [None], {}, {"a": 1},
                    float("nan"), float("inf"), 10**30]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {  # what a method cannot do without, beside targets
    "ADALORA": {"total_step": 100}, "ADAPTION_PROMPT": {"adapter_layers": 1, "adapter_len": 4},
    "CPT": {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "PROMPT_TUNING": {"num_virtual_tokens": 4}, "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 4}, "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4},
    "CARTRIDGE": {"num_virtual_tokens": 4}, "BOFT": {"boft_block_size": 4}, "OFT": {"oft_block_size": 4, "r": 0},
    "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 20}, "WAVEFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]}, "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "TRAINABLE_TOKENS": {"token_indices": [10, 11]}, "UNILORA": {"theta_d_length": 64}, "MISS": {"r": 8},
    "PSOFT": {"r": 8}, "ROAD": {"group_size": 8}, "SHIRA": {"r": 2},
}  # fmt: skip
NO_TARGETS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT",
              "TRAINABLE_TOKENS", "XLORA", "ADAPTION_PROMPT", "SHADOW")  # fmt: skip


# ---- values ----


def odd_values(entry: dict[str, Any], rng: random.Random) -> list[Any]:
    """Border values of a field, values of its kinds that are odd, and values of other kinds; no value twice."""
    values: list[Any] = list(entry.get("choices", ()))
    values += [str(c).upper() for c in entry.get("choices", ())][:1]
    for bound in ("ge", "gt", "le", "lt"):
        if bound in entry:
            values += [entry[bound], entry[bound] - 1, entry[bound] + 1, entry[bound] + 0.5]
    default = entry.get("default")
    if isinstance(default, int | float) and not isinstance(default, bool):
        values += [default * 2, -default, default + 1]
    for kind in entry["kinds"]:
        values += OF_KIND[kind]
    if isinstance(default, bool):
        values += [not default, int(not default)]
    if "table" in entry:  # a block of its own: each of its fields, odd in turn
        for key, inner in fields.field_tables()[entry["table"]].items():
            if "kinds" in inner:
                values += [{key: v} for v in rng.sample(odd_values(inner, rng), 3)]
    values += WRONG
    unique = {repr((type(v).__name__, v)): v for v in values}
    return list(unique.values())


def cases(rng: random.Random, per_field: int, only: str = "") -> Iterator[tuple[str, str, Any]]:
    """(run, dotted key, value): of each field of each class some values, drawn by `rng`."""
    from kit.config.sections import OWNED_ELSEWHERE

    sections = {"SFTConfig": ("trainer", "trainer"), "BitsAndBytesConfig": ("quantization", "quantization")}
    sections |= {name: (name, "peft") for name in fields.peft_types()}
    sections |= {name: (name, name) for name in fields.field_tables() if name.partition(".")[0] == "deepspeed"}
    for table, (run, section) in sections.items():
        if only and not {table.lower(), section.partition(".")[0]} & set(only.lower().split(",")):
            continue
        for key, entry in fields.field_tables()[table].items():
            if "instead" in entry or (section == "trainer" and key in OWNED_ELSEWHERE) or key == "peft_type":
                continue
            values = odd_values(entry, rng)
            for value in rng.sample(values, min(per_field, len(values))):
                yield run, f"{section}.{key}", value


# ---- the runs that the values are written into ----


class Runs:
    """Valid runs on a tiny model, one for each class whose fields are tried."""

    def __init__(self, folder: Path) -> None:
        import tiny

        self.folder, self.count = folder, 0
        base, data = tiny.make_model(folder / "base"), folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in tiny.text_rows(24)))
        stock = [f"model.name_or_path={base}", f"dataset.path={data}", "trainer.use_cpu=true", "trainer.max_length=32",
                 f"runs_dir={folder / 'runs'}", "trainer.per_device_train_batch_size=2", "trainer.max_steps=2",
                 "trainer.logging_steps=1", "trainer.eval_strategy=steps", "trainer.eval_steps=1",
                 "trainer.save_strategy=steps", "trainer.save_steps=1", "dataset.test_size=0.2",
                 "trainer.gradient_checkpointing=false"]  # fmt: skip
        self.trainer = compose(stock)
        self.quantization = compose([*stock, "quantization=nf4"])
        self.deepspeed = compose([*stock, "deepspeed=zero2"])

    def of(self, run: str) -> Composed:
        if run == "trainer":
            return self.trainer
        if run == "quantization":
            return self.quantization
        if run.startswith("deepspeed"):
            return self.deepspeed
        tree = copy.deepcopy(self.trainer.tree)
        targets = {} if run in NO_TARGETS else {"target_modules": ["q_proj", "v_proj"]}
        tree["peft"] = {"peft_type": run, "task_type": "CAUSAL_LM", **targets, **METHODS.get(run, {})}
        return replace(self.trainer, tree=tree)

    def changed(self, run: str, key: str, value: Any) -> Composed:
        composed = self.of(run)
        tree = copy.deepcopy(composed.tree)
        parent, _, last = key.rpartition(".")
        at = tree
        for part in block_path(parent):
            at[part] = at.get(part) or {}
            at = at[part]
        at[last] = value
        if key.startswith("deepspeed.scheduler.") or key.startswith("deepspeed.optimizer."):
            fill_types(tree["deepspeed"], key)
        return replace(composed, tree=tree, provenance={**composed.provenance, key: f"command line: {key}={value}"})


# tables of DeepSpeed that are not named by the place of their block
PLACES = {
    "deepspeed.DeepSpeedZeroLeafModuleConfig": "deepspeed.zero_optimization.leaf_module",
    "deepspeed.DeepSpeedZeroOffloadOptimizerConfig": "deepspeed.zero_optimization.offload_optimizer",
    "deepspeed.DeepSpeedZeroOffloadParamConfig": "deepspeed.zero_optimization.offload_param",
    "deepspeed.ZenFlowConfig": "deepspeed.zero_optimization.zenflow",
    "deepspeed.TPConfig": "deepspeed.tensor_parallel.tp",
    "deepspeed.optimizer.adam": "deepspeed.optimizer.params",
}


def block_path(table: str) -> list[str]:
    place = PLACES.get(table, table)
    if place.startswith("deepspeed.scheduler."):
        place = "deepspeed.scheduler.params"
    return place.split(".")


def fill_types(ds: dict[str, Any], key: str) -> None:
    part = key.split(".")[1]
    if key in (f"deepspeed.{part}.type",):
        ds[part].setdefault("params", {})
    elif part == "scheduler":
        name = key.split(".")[2]
        ds[part].setdefault("type", name if name[0].isupper() else "WarmupLR")
        ds[part].setdefault("params", {})
    else:
        ds[part].setdefault("type", "AdamW")


# ---- what the kit says ----


def ask_kit(composed: Composed) -> tuple[RunPlan | None, list[str]]:
    """The plan with its warnings, or None with the problems."""
    try:
        plan = build_plan(composed)
    except KitError as error:
        return None, [f"{p.problem} [{p.rule}]" for p in error.problems]
    return plan, [f"{w['problem']} [{w['rule']}]" for w in plan.warnings]


# ---- what the library says ----


def construct(run: str, key: str, value: Any, composed: Composed) -> Any:
    """The library's own class with the value as it stands; returns what it holds then. Raises what it raises."""
    last = key.rpartition(".")[2]
    section = key.partition(".")[0]
    if section == "trainer":
        from trl import SFTConfig

        given = {k: v for k, v in composed.tree["trainer"].items() if v != "auto"}
        return getattr(SFTConfig(**{"output_dir": "unused", "bf16": False, "report_to": "none", **given}), last)
    if section == "peft":
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

        given = dict(composed.tree["peft"])
        return getattr(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(given.pop("peft_type"))](**given), last)
    if section == "quantization":
        from transformers import BitsAndBytesConfig

        given = {k: v for k, v in composed.tree["quantization"].items() if v != "auto"}
        return getattr(BitsAndBytesConfig(**given), last)
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = copy.deepcopy(composed.tree["deepspeed"])
    ds |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 2}
    if key.rpartition(".")[0] == "deepspeed" and value != "auto":  # an "auto" is filled before DeepSpeed reads it
        ds[last] = value
    ds["fp16"] = {"enabled": False} if ds.get("fp16", {}) == {"enabled": "auto"} else ds.get("fp16")
    ds["bf16"] = {"enabled": False} if ds.get("bf16", {}) == {"enabled": "auto"} else ds.get("bf16")
    DeepSpeedConfig({k: v for k, v in ds.items() if v is not None})
    return value


PHASES = [  # the innermost of these functions on a traceback says how far a run had come
    ("step", {"training_step", "prediction_step", "evaluation_loop", "evaluate", "_maybe_log_save_evaluate",
              "save_model", "_save_checkpoint", "save_and_evaluate", "clip_grad_norm_", "optimizer_step"}),
    ("prepared", {"_inner_training_loop", "create_optimizer_and_scheduler", "create_optimizer", "create_scheduler",
                  "get_train_dataloader", "train_loop"}),
    ("trainer", {"__init__"}),
]  # fmt: skip


def phase_of(trace: traceback.StackSummary) -> str:
    names = [frame.name for frame in trace]
    files = [frame.filename for frame in trace]
    if any(n in PHASES[0][1] for n in names):
        return "step"
    if "train" in names and any(f.endswith("transformers/trainer.py") and n in ("train", "_inner_training_loop")
                                for n, f in zip(names, files, strict=True)):  # fmt: skip
        return "prepared"
    if any(f.endswith("kit/training/trainer.py") and n == "__init__" for n, f in zip(names, files, strict=True)):
        return "trainer"
    if "start_rank" in names:
        return "constructor"
    return "loading"


def run_child(plan: RunPlan, key: str, value: Any) -> dict[str, Any]:
    """Train the plan as the worker does, in this process; how far it came, and what it did to the value."""
    import torch

    import kit.training.run as worker
    from kit.training.trainer import ModifiedTrainer

    torch.manual_seed(0)
    made: list[Any] = []
    before: dict[str, Any] = {}
    init = ModifiedTrainer.__init__

    def noted(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        made.append(self)
        before.update({n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad})

    ModifiedTrainer.__init__ = noted  # type: ignore[method-assign]
    out: dict[str, Any] = {"phase": "done", "error": ""}
    try:
        worker.train(plan)
        steps = made[0].state.global_step
        now = dict(made[0].model.named_parameters())
        moved = [n for n, p in before.items() if n in now and not torch.equal(p, now[n].detach())]
        out |= {"steps": steps, "moved": len(moved), "trained": len(before)}
    except BaseException as error:
        out |= {"phase": phase_of(traceback.extract_tb(error.__traceback__)),
                "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}  # fmt: skip
        out["where"] = [f"{Path(f.filename).name}:{f.name}" for f in traceback.extract_tb(error.__traceback__)][-4:]
    return out


def adapt_child(plan: RunPlan) -> dict[str, Any]:
    """Put the plan's adapter on the base and take one step by hand: what building a trainer does of a PEFT config."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from kit.models.load import load_peft_config

    out: dict[str, Any] = {"phase": "done", "error": "", "steps": 1}
    phase = "constructor"
    try:
        torch.manual_seed(0)
        config = load_peft_config(plan)
        phase = "trainer"
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(plan.model.name_or_path), config)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in trained.items()}
        phase = "step"
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
        rows = torch.randint(7, 30, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            loss = model.train()(input_ids=rows, labels=rows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not torch.isfinite(loss):
            return out | {"phase": "step", "error": f"loss is {loss.item()}"}
        moved = [n for n, p in before.items() if not torch.equal(p, trained[n].detach())]
        return out | {"moved": len(moved), "trained": len(before)}
    except BaseException as error:
        return out | {"phase": phase, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def in_child(act: Any, *args: Any, limit: int = WAIT) -> Any:
    """What `act` returns in a process of its own, whose memory and time are limited."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.setpgid(0, 0)
        with contextlib.suppress(Exception):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, 2 * LIMIT))  # SIGXCPU, which tells it from no memory
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        if torch := sys.modules.get("torch"):
            # A fork's first call makes torch's thread pool anew; two threads that call at once find none.
            torch.set_num_threads(1)
        try:
            result = act(*args)
        except BaseException as error:
            result = {"phase": "constructor", "error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        with contextlib.suppress(BaseException), os.fdopen(write, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write)
    data = bytearray()
    deadline = time.monotonic() + limit
    import select

    with os.fdopen(read, "rb", buffering=0) as pipe:
        while time.monotonic() < deadline:
            if select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                block = pipe.read(65536)
                if not block:
                    break
                data += block
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if data:
        with contextlib.suppress(Exception):
            return pickle.loads(bytes(data))
    late = time.monotonic() >= deadline or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU
    return {"phase": "timeout" if late else "died", "error": f"signal {os.waitstatus_to_exitcode(status)}"}


def same(value: Any, given: Any) -> bool:
    import enum

    import mutate

    given = given.value if isinstance(given, enum.Enum) else given
    if isinstance(value, str) and str(given) == f"torch.{value}":
        return True
    if isinstance(value, list) and isinstance(given, set | tuple | list):
        return set(map(str, value)) == {str(getattr(g, "value", g)) for g in given}
    if value == "" and not given:
        return True
    if isinstance(value, bool) != isinstance(given, bool) and isinstance(given, bool):
        return bool(value) == given
    return mutate.same(value, given)


# ---- the campaign ----

# Known to be otherwise than they look: pinned memory is for GPUs, eval_steps=0 means logging_steps, the others have
# aliases or an "auto" of the kit's own.
ALIASES = {"dataloader_pin_memory", "loss_type", "include_num_input_tokens_seen", "debug", "bf16", "fp16", "use_cpu",
           "eval_steps"}  # fmt: skip


def judge(runs: Runs, run: str, key: str, value: Any, train: bool) -> dict[str, Any]:
    """One value: {said, outcome, ...}. `train`: through the worker where check accepts it."""
    composed = runs.changed(run, key, value)
    row: dict[str, Any] = {"run": run, "key": key, "value": value}
    try:
        plan, said = ask_kit(composed)
    except Exception:
        return row | {"outcome": "crashed", "error": traceback.format_exc()[-600:]}
    row |= {"accepted": plan is not None, "said": said}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            held = construct(run, key, value, composed)
            row["constructor"] = ""
            row["held"] = same(value, held) or key.rpartition(".")[2] in ALIASES
        except Exception as error:
            row["constructor"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    if plan is None:
        row["outcome"] = "early" if row["constructor"] else "refused"
        return row
    if row["constructor"]:
        # the plan's own value may differ from the tree's: 2e2 -> 200
        try:
            construct(run, key, value, replace(composed, tree={**composed.tree, **planned(plan)}))
        except Exception:
            return row | {"outcome": "late", "phase": "constructor", "error": row["constructor"]}
    if not train and key.partition(".")[0] != "peft":
        return row | {"outcome": "accepted" if row.get("held", True) else "lost"}
    if plan.deepspeed:
        return row | {"outcome": "accepted"}
    runs.count += 1
    place = runs.folder / "runs" / str(runs.count)
    place.mkdir(parents=True)
    plan = plan.model_copy(update={"run_dir": str(place)})
    done = in_child(run_child, plan, key, value) if train else in_child(adapt_child, plan)
    shutil.rmtree(place, ignore_errors=True)
    row |= {k: done.get(k) for k in ("phase", "error", "where", "steps", "moved", "trained")}
    row["whole"] = train
    if done["phase"] == "done":
        nothing = not done["moved"] or not done["steps"]
        row["outcome"] = "silent" if (nothing or not row.get("held", True)) and not said else "fine"
    else:
        row["outcome"] = {"step": "step", "timeout": "timeout"}.get(done["phase"], "late")
    return row


def planned(plan: RunPlan) -> dict[str, Any]:
    return {"trainer": plan.trainer, "peft": plan.peft, "quantization": plan.quantization, "deepspeed": plan.deepspeed}


def campaign(
    folder: Path, seed: int, per_field: int, count: int, only: str = "", key: str = "", note: Any = lambda row: None
) -> list[dict[str, Any]]:
    """Every drawn value judged, a seeded sample of those that check accepts trained."""
    rng = random.Random(seed)
    runs = Runs(folder)
    drawn = [c for c in cases(rng, per_field, only) if key in c[1]]
    rows = []
    for case in drawn:
        rows.append(judge(runs, *case, train=False))
        note(rows[-1])
    accepted = [i for i, row in enumerate(rows) if row.get("accepted") and row["outcome"] != "late"]
    accepted = [i for i in accepted if not rows[i]["key"].startswith("deepspeed")]
    for i in rng.sample(accepted, min(count, len(accepted))):
        rows[i] = judge(runs, *drawn[i], train=True)
        note(rows[i])
    return rows


def summary(rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Counts by class and outcome, and every value that came late or failed in a step, each with its reason."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[{"trainer": "SFTConfig", "quantization": "BitsAndBytesConfig"}.get(row["key"].split(".")[0], (
            "DeepSpeed" if row["key"].startswith("deepspeed") else "PEFT"))][row["outcome"]] += 1  # fmt: skip
    whole = [row for row in rows if row.get("whole")]
    listed = {
        outcome: [
            f"{r['run']}: {r['key']}={r['value']!r}: {r.get('error') or 'nothing moved, or the value is lost'}"[:220]
            for r in rows
            if r["outcome"] == outcome
        ]
        for outcome in ("late", "step", "silent", "timeout", "crashed")
    }
    return {
        "seed": seed, "values": len(rows), "counts": {k: dict(c.most_common()) for k, c in counts.items()},
        "through_the_worker": dict(Counter(row["outcome"] for row in whole)), "listed": listed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-field", type=int, default=6)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--only", default="")
    parser.add_argument("--key", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    prepare_process()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kit-fields-") as folder:
        out = options.rows and options.rows.open("w", buffering=1)
        rows = campaign(
            Path(folder), options.seed, options.per_field, options.runs, options.only, options.key,
            lambda row: out and out.write(json.dumps(row, default=str) + "\n"),
        )  # fmt: skip
    if options.out:
        seconds = {"seconds": round(time.monotonic() - started)}
        options.out.write_text(json.dumps(summary(rows, options.seed) | seconds, indent=1, ensure_ascii=False) + "\n")
    counts = Counter(row["outcome"] for row in rows)
    print(f"{len(rows)} values, {time.monotonic() - started:.0f} s:", dict(counts.most_common()), file=sys.__stderr__)


def prepare_process() -> None:
    os.environ.update(
        HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu",
        HF_HUB_DISABLE_TELEMETRY="1", NO_COLOR="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="kit-fields-cache-"))
    import logging

    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    import kit.training.run  # noqa: F401
    import kit.training.trainer  # noqa: F401

    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
