"""What only GPUs show of launching: the devices of trials and nodes, NCCL, out of memory, what watching costs.

    python tests/on_gpus.py --out results.json                       (2 GPUs of 80 GB; all cases, 6 minutes)
    python tests/on_gpus.py --out results.json --cases oom           (1 GPU)
    python tests/on_gpus.py --out /tmp/x.json --cpu --tiny           (rehearsal, no devices)

sweep    four trials, each on one of the GPUs, two at a time, under launch=local and launch=deepspeed.
nodes    two "nodes" of one machine that see one GPU each, with `--no_ssh` and with torchrun; one is told to stop, both
         go on; losses beside those of one node with two.
oom      three trials in a warm worker, the second too large: it starts cold, fails, and the third is trained.
packing  tiny models of many architectures in bf16: what keeps packed documents apart passes, the rest is refused.
resume   a run on two GPUs goes on with one, and one with two, in bf16 and fp16: losses beside a run never stopped.
watch    seconds a step with and without what `kit watch` shows of the ranks, in turns.

JSON is written after each case: what was found, and what is wrong with that. Exit code 1 where something is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE / "benchmarks")]

from arms import LORA, call, environment, machine, make_base_apart, make_data, run_kit  # noqa: E402

from launch import harness  # noqa: E402

LOSS = 5e-3  # of losses near 12 in bf16: sums of two ranks are added in another order
BLOCK = 8  # steps of a turn of `watch`
Found = dict[str, Any]


class Machine:
    """The base, the rows and the settings that all cases share."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.work, self.env = a, Path(a.work), environment(a.cpu)
        self.work.mkdir(parents=True, exist_ok=True)
        shape, self.length = ("tiny", 64) if a.tiny else ("1b7", 1024)
        self.base, self.data = self.work / f"base-{shape}", self.work / "rows.jsonl"
        make_base_apart(self.base, shape, "cpu" if a.cpu else "cuda")
        make_data(self.data, 1200, self.length + 8)

    def overrides(self, runs: Path, *more: str, **trainer: Any) -> list[str]:
        common = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_length=self.length, seed=42,
                      max_steps=12, logging_steps=1, save_strategy="no", report_to="none",
                      learning_rate="1e-4")  # fmt: skip
        common |= dict(use_cpu="true", bf16="false", fp16="false") if self.a.cpu else dict(bf16="true")
        return [
            f"model.name_or_path={self.base}", f"dataset.path={self.data}", f"runs_dir={runs}",
            *(f"peft.{k}={v}" for k, v in LORA.items()), *(f"trainer.{k}={v}" for k, v in (common | trainer).items()),
            *more,
        ]  # fmt: skip

    def folder(self, name: str) -> Path:
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / name).mkdir()
        return self.work / name


class Devices(threading.Thread):
    """Which GPUs the ranks of which run hold, as the driver says, and how many runs have ranks at once."""

    def __init__(self, cpu: bool) -> None:
        super().__init__(daemon=True)
        self.cpu, self.most, self.over = cpu, 0, threading.Event()
        self.seen: dict[str, set[str]] = {}
        self.numbers = {} if cpu else dict(line[::-1] for line in smi("--query-gpu=index,uuid"))
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.2):
            runs = {str(p.pid): name for p in psutil.process_iter() if (name := trained_by(p))}
            self.most = max(self.most, len(set(runs.values())))
            for pid, gpu in [] if self.cpu else smi("--query-compute-apps=pid,gpu_uuid"):
                if pid in runs:
                    self.seen.setdefault(runs[pid], set()).add(self.numbers[gpu])

    def end(self) -> dict[str, list[str]]:
        self.over.set()
        self.join()
        return {name: sorted(seen) for name, seen in sorted(self.seen.items())}


def smi(query: str) -> list[list[str]]:
    out = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout
    return [[word.strip() for word in line.split(",")] for line in out.splitlines()]


def trained_by(process: psutil.Process) -> str:
    """The run whose rank, or whose ranks' launcher, a process is."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    plan = next((word for word in words if word.endswith("/plan.json")), "")
    return Path(plan).parent.name if "kit.worker" in words else ""


def sweep(m: Machine) -> tuple[Found, list[str]]:
    found, wrong = {}, []
    for launcher in ("local", "deepspeed"):
        runs = m.folder(f"sweep-{launcher}")
        more = [f"launch={launcher}", "launch.num_gpus=1", "hparams_search.parallel=2", "name=side"]
        more += ["deepspeed=zero2"] if launcher == "deepspeed" else []
        overrides = [o for o in m.overrides(runs, *more) if "learning_rate" not in o]
        rates = "trainer.learning_rate=1e-4,2e-4,3e-4,4e-4"
        devices = Devices(m.a.cpu)
        argv = [sys.executable, "-m", "kit", "train", "-m", rates, *overrides]
        code, seconds = call(argv, m.env, runs / "log", m.a.limit)
        held = devices.end()
        states = [harness.status(p.parent)["state"] for p in sorted(runs.glob("*/*/plan.json"))]
        row = {"code": code, "seconds": round(seconds, 1), "states": states, "at_once": devices.most, "devices": held}
        found[launcher] = row
        if code or states != ["done"] * 4 or devices.most != 2:
            wrong.append(f"{launcher}: not four trials, two at a time: {row} {tail(runs / 'log')}")
        one_each = sorted(map(len, held.values())) == [1] * 4 and {*sum(held.values(), [])} == {"0", "1"}
        if not m.a.cpu and not one_each:
            wrong.append(f"{launcher}: not each trial on one of two devices: {row['devices']}")
    return found, wrong


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else "no log"


def nodes(m: Machine) -> tuple[Found, list[str]]:
    found, wrong, runs = {}, [], m.folder("one-node")
    more = ["launch=deepspeed", "launch.num_gpus=2", "deepspeed=zero2"]
    argv = [sys.executable, "-m", "kit", "train", *m.overrides(runs, *more, max_steps=60)]
    code, _ = call(argv, m.env, runs / "log", m.a.limit)
    if code:
        return {}, [f"one node ended with {code}: {tail(runs / 'log')}"]
    reference = harness.rows(harness.the_run(runs))
    for launcher in ("deepspeed", "torchrun"):
        row, said = two_nodes(m, launcher)
        losses = row.pop("losses")
        apart = max(abs(losses[s] - reference[s]) for s in reference) if sorted(losses) == sorted(reference) else None
        found[launcher] = row | {"losses_apart": apart}
        if row["stopped"] != [75, 75] or row["then"] != [0, 0] or apart is None or apart > LOSS:
            wrong.append(f"{launcher}: {found[launcher]} {said}")
        if not m.a.cpu and sorted(sum(row["devices"].values(), [])) != ["0", "1"]:
            wrong.append(f"{launcher}: not one GPU each: {row['devices']}")
    return found, wrong


def two_nodes(m: Machine, launcher: str) -> tuple[Found, str]:
    """One run that is told to stop on node 1 and then goes on, and the end of what its nodes said."""
    runs = m.folder(f"nodes-{launcher}")
    more = [f"launch={launcher}", "launch.num_nodes=2", "launch.num_gpus=1", "launch.node_rank=0", "deepspeed=zero2"]
    more += ["launch.master_addr=127.0.0.1", *["launch.no_ssh=true"] * (launcher == "deepspeed")]

    def node(rank: int, *words: str) -> subprocess.Popen[str]:
        env = m.env if m.a.cpu else m.env | {"CUDA_VISIBLE_DEVICES": str(rank)}
        return harness.start([sys.executable, "-m", "kit", *words], runs, **env)

    devices = Devices(m.a.cpu)
    first = node(0, "train", *m.overrides(runs, *more, max_steps=60))
    harness.wait_for(lambda: list(runs.glob("*/launch.json")), 60, first)
    run = harness.the_run(runs)
    launched = json.loads((run / "launch.json").read_text())["argv"]
    port = launched[launched.index("--master_port") + 1]
    second = node(1, "launch-node", str(run), "--node-rank", "1", "--master-port", port)
    harness.wait_for(lambda: (run / "metrics.jsonl").exists() and len(harness.rows(run)) >= 3, 150, first)
    second.send_signal(signal.SIGTERM)
    stopped, at = [harness.finish(p) for p in (first, second)], len(harness.rows(run))
    words = ("launch-node", str(run), "--master-port", port, "--resume", "newest", "--node-rank")
    then = [harness.finish(p) for p in [node(rank, *words, str(rank)) for rank in (0, 1)]]
    row: Found = {"stopped": [d.returncode for d in stopped], "at_step": at, "then": [d.returncode for d in then]}
    row |= {"devices": devices.end(), "losses": harness.rows(run)}
    return row, "\n".join(d.stderr[-1500:] for d in (*stopped, *then))


def oom(m: Machine) -> tuple[Found, list[str]]:
    runs = m.folder("oom")
    more = [
        "launch=local",
        "launch.num_gpus=1",
        "hparams_search.parallel=1",
        "hparams_search.workers=warm",
        "name=large",
    ]
    overrides = [o for o in m.overrides(runs, *more, max_steps=2) if "train_batch_size" not in o]
    sizes = "trainer.per_device_train_batch_size=1,600,2"
    argv = [sys.executable, "-m", "kit", "train", "-m", sizes, *overrides]
    code, seconds = call(argv, m.env, runs / "log", m.a.limit)
    status = [harness.status(p.parent) for p in sorted(runs.glob("*/*/plan.json"))]
    row = {
        "code": code,
        "seconds": round(seconds, 1),
        "states": [s["state"] for s in status],
        "said": tail(runs / "log"),
    }
    row["problems"] = [s.get("problems", []) for s in status]
    should = ["done", "failed", "done"]
    wrong = [] if m.a.cpu or (code and row["states"] == should) else [f"not {should}: {row}"]
    return row, wrong


RESUMES = {
    "ddp": (2, 1, ["launch=torchrun"]),
    "zero2": (2, 1, ["launch=deepspeed", "deepspeed=zero2"]),
    "zero2 1 to 2": (1, 2, ["launch=deepspeed", "deepspeed=zero2"]),
    "zero3": (2, 1, ["launch=deepspeed", "deepspeed=zero3"]),
    "zero2_offload": (2, 1, ["launch=deepspeed", "deepspeed=zero2_offload"]),
    "zero2 fp16": (2, 1, ["launch=deepspeed", "deepspeed=zero2", "trainer.fp16=true", "trainer.bf16=false"]),
    "zero2 to zero3": (1, 1, ["launch=deepspeed", "deepspeed=zero2"]),
}


def resume(m: Machine) -> tuple[Found, list[str]]:
    """10 steps with a checkpoint after 5, from which the run goes on with other processes or another ZeRO stage."""
    found, wrong = {}, []
    for name, (before, after, more) in RESUMES.items():
        if m.a.engines and name not in m.a.engines:
            continue
        runs, start = m.folder("resume"), time.time()
        if m.a.cpu and "fp16" in name:
            continue
        steps = dict(max_steps=10, save_strategy="steps", save_steps=5, learning_rate="1e-3")
        whole = m.overrides(runs, *more, f"launch.num_gpus={before}", "global_batch_size=4", **steps)
        whole = [o for o in whole if not o.startswith("trainer.gradient_accumulation_steps")]
        code, _ = call([sys.executable, "-m", "kit", "train", *whole], m.env, runs / "log", m.a.limit)
        if code:
            wrong.append(f"{name}: ended with {code}: {tail(runs / 'log')}")
            print(wrong[-1], flush=True)
            continue
        run = harness.the_run(runs)
        shutil.rmtree(run / "checkpoints" / "checkpoint-10")
        reference = harness.rows(run)
        (run / "metrics.jsonl").unlink()
        words = [f"launch.num_gpus={after}"] if after != before else ["deepspeed.zero_optimization.stage=3"]
        (run / "status.json").write_text('{"state": "stopped", "exit_code": 75, "step": 5}')
        argv = [sys.executable, "-m", "kit", "resume", str(run), *words]
        code, _ = call(argv, m.env, runs / "resume-log", m.a.limit)
        losses = harness.rows(run)
        apart = max((abs(losses[s] - reference[s]) for s in range(6, 11) if s in losses), default=None)
        moved = max(abs(reference[s] - reference[s - 1]) for s in range(6, 11))
        found[name] = {"code": code, "losses_apart": apart, "largest_step_to_step": moved}
        found[name]["seconds"] = round(time.time() - start, 1)
        print(name, found[name], flush=True)
        if code or apart is None or apart > LOSS * 4:
            wrong.append(f"{name}: {found[name]} {tail(runs / 'resume-log')}")
    return found, wrong


def packing(m: Machine) -> tuple[Found, list[str]]:
    import torch

    sys.path.insert(0, str(HERE / "training"))
    import test_packing_proof as cases

    from kit.errors import KitError
    from kit.training.packing_proof import prove_packing

    found: Found = {}
    wrong: list[str] = []
    on_gpu = {} if m.a.cpu else {"use_cpu": False, "bf16": True}
    models = [(kind, changes, True) for kind, changes in cases.APART.items()]
    models += [(kind, changes, False) for kind, changes in {**cases.LEAKING, **cases.REFUSING}.items()]
    for kind, changes, apart in models[:: 6 if m.a.tiny else 1]:
        for attention in ("sdpa", "eager"):
            name, folder = f"{kind} {attention}", m.work / "packing"
            try:
                model = cases.model_of(kind, attention, **changes)
                model = model.to(torch.float32 if m.a.cpu else torch.bfloat16)
                base = folder / "base"
                if not base.exists():
                    cases.tiny.make_model(base)
                found[name] = prove_packing(cases.trainer_of(base, folder / "run", model, **on_gpu))
                passed = True
            except KitError as error:
                found[name], passed = {"refused": str(error.problems[0].problem)[:160]}, False
            except ValueError as error:  # an attention that the architecture does not have
                found[name] = {"not run": str(error)[:100]}
                continue
            if passed != apart:
                wrong.append(f"{name} was {'let pass' if passed else 'refused'}")
    return found, wrong


def watch(m: Machine) -> tuple[Found, list[str]]:
    """Two ranks and a line every step, the most that it can cost; blocks of steps with and without it, in one run."""
    folder = m.work / "watch"
    chosen = m.overrides(folder, "launch=deepspeed", "launch.num_gpus=2", "deepspeed=zero2", max_steps=m.a.steps)
    chosen = [o for o in chosen if not o.startswith("runs_dir")]
    row, run = run_kit(folder, chosen, m.env | {"KIT_BENCH_PACE_BLOCK": str(BLOCK)}, m.a.limit)
    if run is None:
        return {}, [str(row)]
    return turns(row["step_seconds"]), []


def turns(step_seconds: list[float]) -> Found:
    """Medians and quartiles of the steps with and without; the first of each turn pays for the one before it."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    for n, seconds in enumerate(step_seconds, 1):  # of step n, counted from 0; the first step is not in the list
        if n >= BLOCK and n % BLOCK:
            taken[n // BLOCK % 2 == 0].append(seconds)
    medians = {on: statistics.median(seconds) for on, seconds in taken.items()}
    spread = {on: statistics.quantiles(seconds, n=4)[::2] for on, seconds in taken.items()}
    found = {"steps": {str(on): len(s) for on, s in taken.items()}, "with": medians[True], "without": medians[False]}
    found |= {"quartiles_with": spread[True], "quartiles_without": spread[False]}
    return found | {"cost": round(medians[True] / medians[False] - 1, 4)}


CASES: dict[str, Callable[[Machine], tuple[Found, list[str]]]] = {
    "sweep": sweep, "nodes": nodes, "oom": oom, "packing": packing, "resume": resume, "watch": watch,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", required=True)
    parser.add_argument("--work", default="/tmp/kit-on-gpus")
    parser.add_argument("--limit", type=float, default=200, help="seconds for one launch")
    parser.add_argument("--engines", nargs="+", choices=RESUMES, help="of `resume`; all")
    parser.add_argument("--steps", type=int, default=160, help="of `watch`")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    a = parser.parse_args()
    out, m = Path(a.out), Machine(a)
    results: dict[str, Any] = {"argv": sys.argv, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "cases": {}}
    for name in a.cases:
        start = time.time()
        try:
            found, wrong = CASES[name](m)
        except Exception as error:  # the next case still runs, and the file says what happened
            found, wrong = {}, [f"{type(error).__name__}: {error}"]
        results["cases"][name] = {"seconds": round(time.time() - start, 1), "found": found, "wrong": wrong}
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results["cases"][name], indent=1), flush=True)
    return int(any(case["wrong"] for case in results["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
