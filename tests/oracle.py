"""What the command line answered at one revision and answers now: for changes that must change nothing.

    python tests/oracle.py REVISION [--with REVISION] [--out FILE] [--only WORD] [--again]

Some 500 command lines (README, recipes, the mistakes table, broken.txt and valid.txt, every --help, `check --json`,
plan.json with its hash, ds_config.json, eject, import, and the verbs that open models) are typed in a copy of the
revision and in a copy of the working tree, both at one path. Exit code, output and every text file that a line leaves
behind are compared, after clocks, ports and process numbers are blanked. A revision is recorded once (`--again`:
anew). Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(tempfile.gettempdir()) / "kit-oracle"
INPUTS, CHECKOUT = FOLDER / "inputs", FOLDER / "checkout"
WORKERS = 2
TEXT = {".json", ".yaml", ".py", ".txt", ".md", ".sh", ".jsonl", ".jinja", ".csv"}
BLANKED = [  # what differs between two runs of one revision
    (r"\d+(\.\d+)?(?= ?(s|ms|h|min|seconds|tokens/s|GB free|MB/s)\b)", "N"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(\+00:00|Z)?", "TIME"),
    (r'("\w*(?:time|started|ended|pid|port|per_second|tokens_per|seconds|memory|rss)\w*": ?)[\d.e+-]+', r"\1N"),
    (r'("MASTER_PORT": |"--master_port", )"\d+"', r'\1"N"'),
    (r"process \d+", "process N"),
    (r"(?m)^.*%\|.*\|.*it/s\]$\n?", ""),  # progress bars
    (r'"deaths": \{[^}]*\}', '"deaths": {}'),
    (r'("\w*seconds": )([\[{])[^\]}]*', r"\1\2N"),
]  # fmt: skip
VERBS = (
    "train check resume merge generate eval fetch convert watch doctor list show why diff eject import launch-node "
    "compose"
).split()
KEYS = (
    "learning_rate peft.r bf16 deepspeed.zero_optimization.stage dataset.path warmup_steps packing max_length "
    "model.dtype launch.num_gpus gradient_checkpointing optim"
).split()


def make_inputs(folder: Path) -> None:
    """Write the models, data sets, adapters and files that the lines name, once."""
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks"), str(ROOT / "tests" / "config")]
    import mistakes_cases
    import tiny
    import torch
    from conftest import write_rows
    from peft import LoraConfig, get_peft_model
    from test_broken import make_files
    from transformers import AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mistakes").mkdir(parents=True)
    base = tiny.make_model(folder / "base")
    world = mistakes_cases.make_world(folder / "mistakes", base, mistakes_cases.CASES)
    (folder / "mistakes.json").write_text(
        json.dumps({case["id"]: mistakes_cases.overrides(case, world) for case in mistakes_cases.CASES})
    )
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder / "lora")
    stray = Path(shutil.copytree(folder / "lora", folder / "cut"))
    (stray / "adapter_model.safetensors").write_bytes((stray / "adapter_model.safetensors").read_bytes()[:300])
    work = folder / "work"  # where every line is typed
    work.mkdir()
    make_files(work)
    write_rows(work / "chats.jsonl", tiny.chat_rows(96))
    write_rows(work / "pairs.jsonl", tiny.prompt_rows(24))
    (work / "my_ds.json").write_text('{"zero_optimization": {"stage": 2, "cpu_offload": true}, "gradient_cliping": 1}')
    shutil.copytree(ROOT / "tests" / "importing", work / "importing")
    (work / "axolotl.yaml").write_text(
        "base_model: a/b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\nsequence_len: 512\n"
        "micro_batch_size: 1\nnum_epochs: 1\ndatasets: [{path: chats.jsonl, type: chat_template}]\n"
    )
    (work / "launch").symlink_to(CHECKOUT / "launch")


def lines(revision: Path) -> list[dict[str, Any]]:
    """[{id, commands: [argv, ...], heavy}]: what is typed, read from the files of the revision."""
    work = INPUTS / "work"
    stock = [f"model.name_or_path={INPUTS / 'base'}", "dataset.path=chats.jsonl", "trainer.max_length=128"]
    cpu = [*stock, "trainer.use_cpu=true"]
    listed: list[dict[str, Any]] = []

    def add(id: str, *commands: list[str], heavy: bool = False) -> None:
        listed.append({"id": id, "commands": list(commands), "heavy": heavy})

    add("help", ["--help"])
    add("no verb", ["trian"])
    for verb in VERBS:
        add(f"help {verb}", [verb, "--help"])
        add(f"bare {verb}", [verb]) if verb not in ("doctor", "list") else None
    readme = (revision / "README.md").read_text()
    example = re.search(r"```yaml\n(# my_run.yaml.*?)```", readme, re.S)
    (work / "my_run.yaml").write_text(example[1] if example else "")
    for page in ("README.md", "recipes/README.md", "launch/README.md"):
        for block in re.findall(r"^```\n(.*?)^```$", (revision / page).read_text(), re.S | re.M):
            for line in block.splitlines():
                if not line.startswith("kit "):
                    continue
                words = shlex.split(line.split("  #")[0])
                if words[1] in ("merge", "generate", "eval", "watch", "doctor", "fetch"):
                    continue
                if words[1] == "train" and "-m" not in words:
                    add(f"readme {line.strip()}", ["check", "--json", *[w for w in words[2:] if w[:2] != "--"]])
                elif words[1] != "train":
                    add(f"readme {line.strip()}", words[1:])
    for recipe in sorted(f.stem for f in (revision / "recipes").glob("*.yaml")):
        add(f"recipe {recipe}", ["check", f"recipe={recipe}", "--json"], ["check", f"recipe={recipe}"])
        add(f"show {recipe}", ["show", recipe])
        add(f"eject {recipe}", ["eject", f"recipe={recipe}", "plain"])
        add(f"zero3 {recipe}", ["check", "--json", f"recipe={recipe}", "deepspeed=zero3_offload", "launch.num_gpus=8"])
    for id, overrides in json.loads((INPUTS / "mistakes.json").read_text()).items():
        add(f"mistake {id}", ["check", *overrides])
    words = re.compile(r"(?:[^\s'{]|'[^']*'|\{[^}]*\})+")
    for name in ("broken", "valid"):
        for line in (revision / "tests" / "config" / f"{name}.txt").read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            own = words.findall(line.split(" | ")[-1])
            heads = {o.partition("=")[0] for o in own}
            given = [] if {"model", "model.name_or_path", "recipe"} & heads else stock[:1]
            given += [] if {"dataset.path", "recipe"} & heads else stock[1:2]
            given += [] if {"trainer.max_length", "recipe"} & heads else stock[2:]
            add(f"{name} {line}", ["check", *(["--json"] if name == "valid" else []), *given, *own])
    for key in KEYS:
        add(f"why {key}", ["why", key, "recipe=quickstart", "deepspeed=zero2"])
    add("diff", ["diff", "quickstart", "recipe=quickstart deepspeed=zero3 launch=deepspeed launch.num_gpus=2"])
    add("rules", ["check", "--rules"])
    for rule in ("lm-head-target", "quantized-storage", "eval-batch", "unknown-key", "nothing-like-it"):
        add(f"explain {rule}", ["check", "--explain", rule])
    for group in (None, "model", "peft", "deepspeed", "quantization", "launch", "tracking", "nothing"):
        add(f"list {group}", ["list", *([group] if group else [])])
    for preset in sorted((revision / "ds_configs").glob("*.json")):
        file = str(CHECKOUT / "ds_configs" / preset.name)
        again = ["check", "--deepspeed", file, "model=llama3_1_8b", "--json"]
        add(f"deepspeed {preset.stem}", ["check", "--deepspeed", file], again)
    for file in ("my_ds.json", "bool.json", "empty.json", "comment.json", "twice.json", "plain.json", "none.json"):
        add(f"fix {file}", ["check", "--deepspeed", file], ["check", "--deepspeed", file, "--fix", "--out", "f.json"],
            ["check", "--deepspeed", file, *stock])  # fmt: skip
    for file in sorted((work / "importing").glob("*.[yj]*")):
        add(f"import {file.name}", ["import", f"importing/{file.name}"])
    add("import command", ["import", "accelerate", "launch", "sft.py", "--model_name_or_path", "a/b", "--use_peft"])
    for engine in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_nvme"):
        add(f"compose {engine}", ["compose", *cpu, f"deepspeed={engine}", "launch=deepspeed", "launch.num_gpus=2"])
    for extra in (["peft=none"], ["trainer.packing=true"], ["trainer.max_steps=7", "name=mine"], ["launch=torchrun"],
                  ["dataset.path=pairs.jsonl", "dataset.test_size=0.25"], ["global_batch_size=16"],
                  ["quantization=nf4"], ["launch=slurm", "launch.slurm.time=1:00:00"]):  # fmt: skip
        add(f"compose {extra}", ["compose", *cpu, *extra])
    add("resume nothing", ["compose", *cpu, "name=r"], ["resume", "runs/r-*"], ["watch", "runs/nothing", "--once"])
    add("sweep refused", ["train", "-m", *cpu, "peft.r=1,0", "trainer.lerning_rate=1,2"])
    add("sweep of wrong keys", ["train", "-m", "hparams_search=optuna", "recipe=quickstart", "peft.q=1,2"])
    add("cfg", ["train", "recipe=quickstart", "--cfg", "job"])
    lora, base = str(INPUTS / "lora"), str(INPUTS / "base")
    for adapter in (lora, str(INPUTS / "cut"), str(INPUTS / "mistakes" / "adapter"), "nothing", "importing"):
        name = Path(adapter).name
        add(f"merge {name}", ["merge", adapter, "--base", base, "--out", "merged"], heavy=True)
        add(f"generate {name}", ["generate", adapter, "--base", base, "--prompts", "the doctor"], heavy=True)
    add("generate model", ["generate", base, "--prompts", "the doctor", "--max-new-tokens", "5"], heavy=True)
    add("eval model", ["eval", base, "--data", "chats.jsonl", "--limit", "8"], heavy=True)
    add("eval adapter", ["eval", lora, "--base", base, "--data", "pairs.jsonl", "--limit", "8"], heavy=True)
    few = [*cpu, "trainer.max_steps=3", "trainer.save_steps=2", "dataset.test_size=0.1", "name=t", "trainer.seed=3"]
    after = [["merge", "RUN"], ["generate", "RUN"], ["eval", "RUN"], ["resume", "RUN"], ["doctor", "RUN"],
             ["why", "learning_rate", "RUN"], ["eject", "RUN", "plain"], ["watch", "RUN", "--once"]]  # fmt: skip
    add("train lora", ["train", *few], *after, ["resume", "RUN", "trainer.max_steps=5"], heavy=True)
    add("train full", ["train", *few, "peft=none"], *after, heavy=True)
    add("train nf4", ["train", *few, "quantization=nf4", "trainer.bf16=false"], *after[:3], heavy=True)
    ids = [line["id"] for line in listed]
    assert len(set(ids)) == len(ids), [id for id in ids if ids.count(id) > 1]
    return listed


SERVER = """
import json, os, sys, traceback
from pathlib import Path
FOLDER, number, heavy = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "heavy"
import kit.__main__, kit.config.compose, kit.config.plan, kit.api
if heavy:
    import torch, transformers, peft, datasets
sys.path[:] = [p for p in sys.path if p]
for line in sys.stdin:
    argv, cwd, out = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(cwd)
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0), os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
        sys.argv = ["kit", *argv]
        code = 0
        try:
            kit.__main__.main(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), flush=True)
"""


class Server:
    """A process that has imported the kit of CHECKOUT, and types one line in a fork of itself after another."""

    def __init__(self, number: int, heavy: bool) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("KIT_", "SLURM_"))}
        env |= {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"}
        env |= {
            "COLUMNS": "200",
            "HF_HOME": str(FOLDER / "hub"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        env |= {"PYTHONHASHSEED": "0"}  # PEFT writes sets
        env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env["PATH"]
        argv = [sys.executable, "-c", SERVER, str(FOLDER), str(number), "heavy" if heavy else "light"]
        self.work = FOLDER / f"work{number}"
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=FOLDER
        )

    def answer(self, line: dict[str, Any]) -> dict[str, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(INPUTS / "work", self.work, symlinks=True)
        before = {f.relative_to(self.work) for f in self.work.rglob("*")}
        out = FOLDER / f"out-{self.work.name}"
        steps = []
        for argv in line["commands"]:
            run = next(iter(sorted(self.work.glob("runs/*-*"))), self.work / "runs" / "none")
            argv = [str(run.relative_to(self.work)) if a == "RUN" else a for a in argv]
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(json.dumps([argv, str(self.work), str(out)]) + "\n")
            self.process.stdin.flush()
            code = json.loads(self.process.stdout.readline())
            steps.append({"code": code, "said": self.blank(out.read_text(errors="replace"))})
        files = {}
        for file in sorted(f for f in self.work.rglob("*") if f.relative_to(self.work) not in before):
            name = self.blank(str(file.relative_to(self.work)))
            if (
                file.is_file()
                and file.suffix in TEXT
                and "tensorboard" not in name
                and file.name != "trainer_state.json"
            ):
                files[name] = self.blank(file.read_text(errors="replace"))
            elif file.is_file():
                files[name] = "(a file)"
        return {"steps": steps, "files": files}

    def blank(self, text: str) -> str:
        text = text.replace(str(self.work), "<WORK>").replace(str(CHECKOUT), "<CHECKOUT>").replace(str(INPUTS), "<IN>")
        for pattern, written in BLANKED:
            text = re.sub(pattern, written, text)
        return "\n".join(line.rstrip() for line in text.splitlines())


def shared_out(listed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every line its worker: a plan's hash knows its folder, so a line is typed in the same one in every run."""
    for heavy in (False, True):
        for number, line in enumerate([x for x in listed if x["heavy"] == heavy]):
            line["worker"] = number % WORKERS
    return listed


def record(listed: list[dict[str, Any]]) -> dict[str, Any]:
    """{id: answer} of the kit in CHECKOUT; workers take the lines in turn, the same ones at each revision."""
    from concurrent.futures import ThreadPoolExecutor

    def work(number: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for heavy in (False, True):
            server = Server(number, heavy)
            for line in [x for x in listed if x["heavy"] == heavy and x["worker"] == number]:
                try:
                    found[line["id"]] = server.answer(line)
                except Exception:  # the others are still worth knowing
                    found[line["id"]] = {"steps": [{"code": None, "said": traceback.format_exc()}], "files": {}}
                    server = Server(number, heavy)
            server.process.stdin.close() if server.process.stdin else None
            server.process.wait()
        return found

    with ThreadPoolExecutor(WORKERS) as pool:
        return {id: said for part in pool.map(work, range(WORKERS)) for id, said in part.items()}


def check_out(revision: str | None) -> None:
    """The files of a revision, or of the working tree (None), at CHECKOUT."""
    shutil.rmtree(CHECKOUT, ignore_errors=True)
    CHECKOUT.mkdir(parents=True)
    if revision:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(CHECKOUT)], input=archive, check=True)
        return
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in {*listed.split("\0")} - {""}:
        source, target = ROOT / name, CHECKOUT / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """{line's id: what differs, as a unified diff}."""
    found: dict[str, list[str]] = {}
    for id in before:
        if before[id] != after.get(id):
            old, new = (json.dumps(x.get(id), indent=1, sort_keys=True).replace("\\n", "\n") for x in (before, after))
            found[id] = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "before", "after", "", "", 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision")
    parser.add_argument("--with", dest="other", help="a revision to compare with, in the working tree's place")
    parser.add_argument("--out", type=Path, help="write the differences as JSON")
    parser.add_argument("--only", default="", help="lines whose id holds this")
    parser.add_argument("--again", action="store_true", help="make inputs and record anew")
    a = parser.parse_args()
    revision = subprocess.run(
        ["git", "rev-parse", a.revision], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()
    recorded = FOLDER / f"{revision}.json"
    if a.again or not recorded.is_file():
        check_out(revision)
        make_inputs(INPUTS)
        listed = shared_out(lines(CHECKOUT))
        (FOLDER / "lines.json").write_text(json.dumps(listed))
        recorded.write_text(json.dumps(record(listed)))
    listed = shared_out(json.loads((FOLDER / "lines.json").read_text()))
    listed = [line for line in listed if a.only in line["id"]]
    before = {id: said for id, said in json.loads(recorded.read_text()).items() if a.only in id}
    check_out(a.other)
    found = differences(before, record(listed))
    for id, diff in found.items():
        print(f"==== {id}")
        print("\n".join(diff[:40]))
    print(f"{len(before)} lines, {len(found)} differ")
    if a.out:
        a.out.write_text(json.dumps(found, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
