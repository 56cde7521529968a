"""When common mistakes are noticed, and by whom: the kit, a plain TRL script, `deepspeed` alone, other tools.

    python tests/benchmarks/mistakes.py [--faults] [--arms kit plain ...] [--only ID ...] [--json FILE]
        [--keep FOLDER] [--llamafactory VENV] [--axolotl VENV]

Every cell is a process of its own on CPU with a tiny model. Its seconds run from its start until it ends with an
error; `weights` says whether from_pretrained had come back by then, `steps` how many training steps had been taken
(mistakes_hook counts both). What trains to the end noticed nothing. Other tools are run from venvs of their own; a
control without a mistake shows that each arm does train here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mistakes_cases as cases  # noqa: E402

ARMS = ("kit", "plain", "deepspeed", "llamafactory", "axolotl")
HEADS = {"kit": "`kit check`", "plain": "plain TRL script", "deepspeed": "`deepspeed` alone",
         "llamafactory": "LLaMA-Factory", "axolotl": "Axolotl"}  # fmt: skip
LIMIT = 240  # seconds for one cell
CONTROLS = [
    {"id": "control", "what": "no mistake", "kit": []},
    {"id": "control-zero3", "what": "no mistake, ZeRO-3", "kit": ["deepspeed.file={ds}"], "ds": cases.ZERO3},
]
ERROR = re.compile(r"^\s*(?:\[rank\d+\]:\s*)?((?:[a-zA-Z_]\w*\.)*\w*(?:Error|Exception|Interrupt|Exit))\b:? ?(.*)")
WARNING = re.compile(r"(?:WARNING\b|\b\w*Warning:)\W*(.*)")
NOT_ERRORS = ("ChildFailedError", "CalledProcessError", "SystemExit")  # of the launcher: the worker's own came before


def environment(marks: Path, venv: Path | None) -> dict[str, str]:
    """One rank of a world of one: DeepSpeed and the Trainer find what a launcher would set."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    bin_dir = venv / "bin" if venv else Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{HERE / 'mistakes_hook'}{os.pathsep}{ROOT}" if venv is None else str(HERE / "mistakes_hook"),
        "MISTAKES_MARKS": str(marks),
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "DO_NOT_TRACK": "1",
        "AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1", "COLUMNS": "200",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        # DeepSpeed's operators are compiled once for each arm, by its control
        **({"TORCH_EXTENSIONS_DIR": str(venv / "extensions")} if venv else {}),
    }  # fmt: skip


# ---- what each arm is given ----


def kit_argv(case: dict, world: dict[str, Path], folder: Path) -> list[str]:
    verb = ["train"] if "runs" in case else ["check"]
    return [sys.executable, "-m", "kit", *verb, *cases.overrides(case, world)]


def plain_argv(case: dict, world: dict[str, Path], folder: Path) -> list[str]:
    sft = {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": 2, "max_steps": 4, "max_length": 64,
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, **case.get("sft", {}),
    }  # fmt: skip
    if "ds" in case:
        sft["deepspeed"] = str(world[f"ds {case['id']}"])
    settings = {
        "model": str(world[case.get("model", "base")]), "data": str(world[case.get("data", "chat")]), "sft": sft,
        "peft": {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **case.get("peft", {})},
        "quant": case.get("quant"), "init": case.get("init", {}), "eval": case.get("eval"),
        "adapter": str(world["adapter"]) if case.get("adapter") else None, "full": case.get("full", False),
        "resume": None,
    }  # fmt: skip
    cases.write(folder / "settings.json", settings)
    return [sys.executable, str(HERE / "mistakes_plain.py"), str(folder / "settings.json")]


def deepspeed_argv(case: dict, world: dict[str, Path], folder: Path) -> list[str] | str:
    if "ds" not in case or "resume" in case or case.get("ds_alone", True) is not True:
        return case.get("ds_alone", "it has no part in it")
    argv = [sys.executable, str(HERE / "mistakes_deepspeed.py"), str(world["base"]), str(world[f"ds {case['id']}"])]
    return [*argv, *([case["ds_optimizer"]] if "ds_optimizer" in case else [])]


def llamafactory_argv(case: dict, world: dict[str, Path], folder: Path) -> list[str] | str:
    own = case.get("lf", {})
    if isinstance(own, str):
        return own
    data = world[case.get("data", "chat")]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"file_name": str(data), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    cases.write(folder / "dataset_info.json", {"rows": info})
    said = {
        "model_name_or_path": world[case.get("model", "base")], "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "dataset": "rows", "dataset_dir": folder,
        "template": "default", "cutoff_len": 64, "per_device_train_batch_size": 2, "max_steps": 4,
        "output_dir": folder / "out", "report_to": "none", "use_cpu": True, **own,
    }  # fmt: skip
    if "ds" in case:
        said["deepspeed"] = world[f"ds {case['id']}"]
        said |= {k: v for k, v in case.get("sft", {}).items() if k == "optim" or k.startswith("fsdp")}
    return ["llamafactory-cli", "train", str(write_yaml(folder / "lf.yaml", said, world))]


def axolotl_argv(case: dict, world: dict[str, Path], folder: Path) -> list[str] | str:
    own = case.get("ax", {})
    if isinstance(own, str):
        return own
    said = {
        "base_model": world[case.get("model", "base")], "adapter": "lora", "lora_r": 4, "lora_alpha": 8,
        "lora_target_linear": True,
        "datasets": [{"path": str(world[case.get("data", "chat")]), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default", "sequence_len": 64, "micro_batch_size": 2, "max_steps": 4,
        "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4, "optimizer": "adamw_torch",
        "lr_scheduler": "cosine", "output_dir": folder / "out", "dataset_prepared_path": folder / "prepared",
        "use_cpu": True, "bf16": False, "fp16": False, "lora_mlp_kernel": False, "lora_qkv_kernel": False,
        "lora_o_kernel": False, **own,  # its fused LoRA kernels, on by themselves, ask for CUDA
    }  # fmt: skip
    if "lora_target_modules" in own:
        del said["lora_target_linear"]
    if "ds" in case:
        said["deepspeed"] = world[f"ds {case['id']}"]
    return ["axolotl", "train", str(write_yaml(folder / "ax.yaml", said, world)), "--launcher", "python"]


def write_yaml(path: Path, said: dict[str, Any], world: dict[str, Path]) -> Path:
    """JSON is YAML."""
    plain = {k: str(v).format(**world) if isinstance(v, str | Path) else v for k, v in said.items()}
    return cases.write(path, plain)


def resume_argv(arm: str, case: dict, world: dict[str, Path], folder: Path) -> list[str]:
    """Train 4 steps with a checkpoint after 2, go back to where the run had 2, change its input; how it resumes."""
    own = {**world, "base": folder / "base", "chat": folder / "chat.jsonl"}
    shutil.copytree(world["base"], own["base"])
    shutil.copy(world["chat"], own["chat"])
    argv = ARGV[arm](case, own, folder)
    more = ["trainer.max_steps=4", "trainer.save_steps=2", "trainer.per_device_train_batch_size=2"]
    if arm == "kit":
        argv = [sys.executable, "-m", "kit", "train", *argv[4:], *more, "name=stopped"]
    subprocess.run(argv, check=True, capture_output=True, env=environment(folder / "first", None), cwd=folder)
    run = next((folder / "runs").glob("stopped-*")) if arm == "kit" else None
    saves = run / "checkpoints" if run else folder / "out"
    shutil.rmtree(saves / "checkpoint-4")
    cases.CHANGES[case["resume"]](own["base"], own["chat"])
    if run:
        cases.write(run / "status.json", {"state": "stopped", "exit_code": 75, "step": 2})
        return [sys.executable, "-m", "kit", "resume", str(run)]
    settings = json.loads((folder / "settings.json").read_text())
    cases.write(folder / "settings.json", {**settings, "resume": str(saves / "checkpoint-2")})
    return argv


ARGV = {"kit": kit_argv, "plain": plain_argv, "deepspeed": deepspeed_argv, "llamafactory": llamafactory_argv,
        "axolotl": axolotl_argv}  # fmt: skip


# ---- one cell ----


def run(arm: str, case: dict, world: dict[str, Path], folder: Path, venv: Path | None) -> dict[str, Any]:
    """Start it, wait for its end, and read what it said; {"absent": why} where the mistake cannot be made there."""
    folder.mkdir(parents=True)
    argv = resume_argv(arm, case, world, folder) if "resume" in case else ARGV[arm](case, world, folder)
    if isinstance(argv, str):
        return {"absent": argv}
    if venv:
        argv = [str(venv / "bin" / argv[0]), *argv[1:]]
    marks, log = folder / "marks", folder / "log"
    start = time.time()
    with open(log, "w") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
            env=environment(marks, venv) | case.get("env", {}),
        )  # fmt: skip
        try:
            code: int | None = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = None
    seconds = time.time() - start
    marked = marks.read_text().split("\n") if marks.exists() else []
    text = log.read_text(errors="replace")
    return {
        "code": code, "seconds": round(seconds, 1), "weights": any(m.startswith("loaded") for m in marked),
        "steps": sum(m.startswith("stepped") for m in marked), "said": said(arm, code, text, case, folder, world),
        **({"mended": True} if arm == "kit" and "runs" in case and case["runs"] in text and code == 0 else {}),
    }  # fmt: skip


def said(arm: str, code: int | None, text: str, case: dict, folder: Path, world: dict[str, Path]) -> str:
    """The kit's first refusal or warning; else the last error of the log; of a clean end nothing."""
    lines = text.splitlines()
    if arm == "kit":
        rule = case.get("rule", ("",))[0]
        blocks = [b.strip().splitlines() for b in text.split("\n\n") if b.strip()]
        named = [b[0] for b in blocks if any(line.strip() == f"rule:  {rule}" for line in b)]
        named += [x.strip() for x in lines if rule and f"[{rule}]" in x]  # a warning
        named += [x.strip() for x in lines if "runs" in case and case["runs"] in x]
        words = named[0].removeprefix("refused: ") if named else "" if code == 0 else lines[0].strip()
    elif code == 0:
        about = re.compile(case["warned"], re.I) if "warned" in case else None
        words = next((m[1].strip() for x in lines if (m := WARNING.search(x)) and about and about.search(m[1])), "")
    elif code is None:
        return f"still running after {LIMIT} s"
    else:
        found = [i for i, x in enumerate(lines) if (m := ERROR.match(x)) and m[1].split(".")[-1] not in NOT_ERRORS]
        words = lines[found[-1]].strip() if found else next((x.strip() for x in reversed(lines) if x.strip()), "")
        if found and words.endswith(":") and found[-1] + 1 < len(lines):
            words += " " + lines[found[-1] + 1].strip()
    for name, path in [("RUN", folder), *world.items()]:
        words = words.replace(str(path), f"<{name.split()[0]}>")
    return words if len(words) <= 220 else words[:217] + "..."


# ---- the table ----


def cell(result: dict[str, Any]) -> str:
    if "absent" in result:
        return f"– ({result['absent']})"
    words = result["said"].replace("|", "\\|").replace("`", "'")
    if result["code"] == 0 and not words:
        return f"**never**: trains silently ({result['seconds']:.0f} s)"
    if result["code"] == 0 and result["weights"] and not result.get("mended"):
        return f"**trains on** ({result['seconds']:.0f} s), with a warning among others: {words}"
    if result.get("mended"):
        return f"makes it right: {words}"
    when = f"{result['seconds']:.1f} s, {'after' if result['weights'] else 'before'} weights"
    if result["steps"]:
        when += f", after {result['steps']} training step{'s' if result['steps'] > 1 else ''}"
    return f"{when}: {words}"


def table(results: dict[str, dict[str, Any]], arms: list[str]) -> str:
    rows = ["| | mistake | seen in | " + " | ".join(HEADS[a] for a in arms) + " |", "|" + "---|" * (3 + len(arms))]
    for number, case in enumerate([c for c in (*cases.CASES, *cases.FAULTS) if c["id"] in results], 1):
        cells = [cell(results[case["id"]][a]) for a in arms]
        rows.append(f"| {number} | {case['what']} | {case['thread']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def counts(results: dict[str, dict[str, Any]], arm: str) -> dict[str, Any]:
    """Of the mistakes that an arm can make: stopped before weights, after them, only warned of, never noticed."""
    mine = [r[arm] for case, r in results.items() if not case.startswith("control") and "absent" not in r[arm]]
    stopped = [r for r in mine if r["code"] != 0]
    seconds = sorted(r["seconds"] for r in stopped)
    return {
        "possible": len(mine), "before weights": sum(not r["weights"] for r in stopped),
        "after weights": sum(r["weights"] for r in stopped),
        "made right": sum(bool(r.get("mended")) for r in mine),
        "only warned of": sum(r["code"] == 0 and bool(r["said"]) and not r.get("mended") for r in mine),
        "never": sum(r["code"] == 0 and not r["said"] for r in mine),
        "median seconds": seconds[len(seconds) // 2] if seconds else None,
    }  # fmt: skip


def versions(arms: list[str], venvs: dict[str, Path]) -> dict[str, Any]:
    names = ("torch", "transformers", "trl", "peft", "deepspeed", "accelerate")
    found: dict[str, Any] = {"kit": {n: metadata.version(n) for n in names}}
    for arm, venv in venvs.items():
        if arm in arms:
            code = f"from importlib.metadata import version as v; print(*[v(n) for n in {(arm, *names)}])"
            out = subprocess.run([venv / "bin" / "python", "-c", code], capture_output=True, text=True).stdout.split()
            found[arm] = dict(zip((arm, *names), out, strict=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:3]))
    parser.add_argument("--faults", action="store_true", help="what fails silently, late, or at a resume")
    parser.add_argument("--only", nargs="+", metavar="ID")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written, and what it holds already is kept")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="models, data and logs stay here")
    parser.add_argument("--llamafactory", type=Path, metavar="VENV")
    parser.add_argument("--axolotl", type=Path, metavar="VENV")
    a = parser.parse_args()
    venvs = {arm: venv.absolute() for arm in ARMS[3:] if (venv := getattr(a, arm))}
    if missing := [arm for arm in a.arms if arm in ARMS[3:] and arm not in venvs]:
        parser.error(f"--{missing[0]} VENV is needed")
    old = json.loads(a.json.read_text()) if a.json and a.json.exists() else {"results": {}, "versions": {}}
    results: dict[str, dict[str, Any]] = old["results"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (a.keep or Path(scratch)).absolute()
        (folder / "world").mkdir(parents=True, exist_ok=True)
        import tiny

        everything = [*CONTROLS, *(cases.FAULTS if a.faults else cases.CASES)]
        world = cases.make_world(folder / "world", tiny.make_model(folder / "world" / "base"), everything)
        for case in everything:
            if a.only and case["id"] not in a.only:
                continue
            for arm in a.arms:
                place = folder / f"{arm}-{case['id']}-{time.time():.0f}"
                got = results.setdefault(case["id"], {})[arm] = run(arm, case, world, place, venvs.get(arm))
                print(f"{case['id']:<24} {arm:<13} {cell(got)}", flush=True)
                if a.json:
                    write_json(a.json, results, old["versions"] | versions([], {}))
    arms = [arm for arm in ARMS if all(arm in r for r in results.values())]
    print("\n" + table(results, arms))
    for arm in arms:
        print(f"{HEADS[arm]:<20} {counts(results, arm)}")
    if a.json:
        write_json(a.json, results, old["versions"] | versions(a.arms, venvs))


def write_json(path: Path, results: dict[str, Any], known: dict[str, Any]) -> None:
    arms = [arm for arm in ARMS if all(arm in r for r in results.values())]
    whole = {
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), "versions": known,
        "counts": {arm: counts(results, arm) for arm in arms}, "results": results,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
