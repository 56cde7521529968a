"""The verb: the plan that is meant, what cannot be ejected, and the files."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from kit.config.data_words import is_data_word
from kit.config.flags import parse_words
from kit.config.nodes import starts_over_ssh
from kit.ejecting.script import JSON, SCRIPT, START, TEMPLATE, render_script
from kit.errors import DONE, KitError, Problem
from kit.inspection import row_template
from kit.inspection.tokenizer import find_chat_template
from kit.launchers.command import rank_environment
from kit.schema.run_plan import RunPlan, load_plan
from kit.storage import run_directory
from kit.storage.hub_cache import NO_TELEMETRY
from kit.system import paths


def eject_verb(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kit eject", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RUN | run.yaml | DATA | key=value | OUT_DIR")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    a = parse_words(parser, argv)
    plan, out = read_plan_and_folder(a.words, a.config_dir)
    for line in write_ejected(plan, out, a.overwrite):
        print(line)
    return DONE


def read_plan_and_folder(words: list[str], config_dir: str | None = None) -> tuple[RunPlan, Path]:
    """The plan and the folder to write: from overrides, or from the run directory that the first bare word names."""
    from kit import api

    composed = [
        w
        for w in words
        if "=" in w or w.startswith("~") or w.endswith((".yaml", ".yml")) or (is_data_word(w) and not Path(w).is_dir())
    ]
    bare = [w for w in words if w not in composed]
    if composed:
        plan = api.compose(*composed, config_dir=config_dir)
    elif bare and (paths.RECIPES / f"{bare[0]}.yaml").is_file() and not (Path(bare[0]) / run_directory.PLAN).is_file():
        raise KitError(f"{bare[0]} is a recipe", bare[0], f"kit eject recipe={bare[0]}")
    elif bare:
        plan = load_plan(run_directory.find_run(bare.pop(0)))
    else:
        raise KitError(
            "nothing to eject", "command line", "kit eject recipe=NAME [OUT_DIR], or kit eject RUN [OUT_DIR]"
        )
    if len(bare) > 1:
        raise KitError(f"one folder to write is enough, not {', '.join(bare)}", "command line", "name one")
    return plan, Path(bare[0] if bare else f"{plan.name}-trl")


def write_ejected(plan: RunPlan, out: Path, overwrite: bool = False) -> list[str]:
    """Write the files of a plan into `out`; returns what to print. KitError where the plan cannot be ejected."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise KitError(f"{out} is not an empty folder", "OUT_DIR", "name another one, or --overwrite")
    refuse_unsupported(plan)
    text = render_script(plan)
    out.mkdir(parents=True, exist_ok=True)
    (out / SCRIPT).write_text(text, encoding="utf-8")
    notes: list[str] = []
    if plan.deepspeed:
        ds, notes = plain_deepspeed_config(plan)
        (out / JSON).write_text(json.dumps(ds, indent=2) + "\n", encoding="utf-8")
    if plan.tokenizer.chat_template:
        shutil.copyfile(find_chat_template(plan.tokenizer.chat_template), out / TEMPLATE)
    (out / START).write_text(start_script(plan, out), encoding="utf-8")
    (out / START).chmod(0o755)
    if plan.prompts:
        notes.append("prompts are asked by kit generate, after training: they are not in the script")
    written = ", ".join(f.name for f in sorted(out.iterdir()) if f.name in (SCRIPT, JSON, START, TEMPLATE))
    lines = len(text.splitlines())
    return [
        f"ejected   {run_directory.path_from_here(out)}: {written} ({lines} lines of Python)",
        *(f"note      {n}" for n in notes),
    ]


def refuse_unsupported(plan: RunPlan) -> None:
    """KitError with everything that a plain script of this length cannot do."""
    problems = []
    if plan.launch.script:
        fix = "call SFTTrainer with your hooks yourself: eject without it, then add them"
        problems.append(Problem("a script of yours starts the kit's worker with its own hooks", "launch.script", fix))
    if start := plan.init_from:
        if start.weights is None:
            problems.append(Problem(f"{start.path} is not here", "peft.init_from", "fetch it, then eject again"))
        elif not start.weights.endswith(".safetensors"):
            problems.append(Problem("the run starts from a pickle", "peft.init_from", "convert it to safetensors"))
        elif not (Path(start.path) / start.weights).is_file():
            problems.append(Problem(f"{start.path} is gone", "peft.init_from", "put the adapter back"))
        if plan.zero_stage == 3:
            problem = "PEFT cannot load an adapter into weights that ZeRO-3 has sharded"
            problems.append(Problem(problem, "peft.init_from", "deepspeed=zero2, or train with the kit"))
    d = plan.dataset
    if d.mix or isinstance(d.path, list):
        problems.append(Problem("several data sets", "dataset.mix", "join them in one file, then eject"))
    elif d.format not in ("auto", "messages", "prompt_completion", "text"):
        fix = "kit data ... --fix-out clean.jsonl writes rows that TRL reads; eject with that file"
        problems.append(Problem(f"TRL does not read {d.format} rows", "dataset.format", fix))
    if d.train_on not in (None, "everything"):
        fix = "trainer.assistant_only_loss=true, or prompt and completion rows"
        problems.append(Problem(f"TRL has no setting for train_on={d.train_on}", "dataset.train_on", fix))
    if d.streaming and d.test_size:
        problems.append(Problem("a stream cannot be split", "dataset.test_size", "dataset.eval_path=FILE"))
    if d.streaming and d.format == "auto":
        problems.append(Problem("the columns of the stream are not known", "dataset.format", "dataset.format=text"))
    odd = (
        [n for n in row_template.template_columns(d.template) if not re.fullmatch(r"[^\W\d][^.\[\]]*", n)]
        if d.template
        else []
    )
    if odd:
        problem = f"str.format cannot read the columns {', '.join(odd)}"
        problems.append(Problem(problem, "dataset.template", "rename the columns in the data"))
    if problems:
        raise KitError(problems)


def plain_deepspeed_config(plan: RunPlan) -> tuple[dict[str, Any], list[str]]:
    """The plan's JSON, with the one switch that a plain trainer needs in order to save anything under ZeRO-3."""
    ds = json.loads(json.dumps(plan.deepspeed))
    gather = "stage3_gather_16bit_weights_on_model_save"
    if plan.zero_stage != 3 or ds["zero_optimization"].get(gather):
        return ds, []
    ds["zero_optimization"][gather] = True
    note = (
        f"{gather} is true: a plain trainer saves nothing under ZeRO-3 without it; the kit gathers the adapter alone"
    )
    return ds, [note]


def start_script(plan: RunPlan, out: Path) -> str:
    """The environment and the command line with which `kit train` would start the ranks."""
    env = rank_environment(plan.model_copy(update={"run_dir": str(out.absolute())}))
    env = {k: v for k, v in env.items() if k not in ("PATH", "PYTHONUNBUFFERED", "TORCH_EXTENSIONS_DIR")}
    quiet = " ".join(f"{k}={shlex.quote(env.pop(k))}" for k in NO_TELEMETRY)
    port = str(plan.launch.master_port or '"${MASTER_PORT:-29500}"')
    where = f"--master_addr 127.0.0.1 --master_port {port}"
    count, nodes = plan.launch.num_gpus, plan.launch.num_nodes
    if nodes not in (1, "auto"):  # one command on each of them, or with ssh for all
        where = f'--master_addr "${{MASTER_ADDR:?}}" --master_port {port}'
        rank = '--node_rank "${NODE_RANK:?}"'
        command = f"torchrun --nnodes {nodes} {rank} --nproc_per_node {count} {where} {SCRIPT}"
        if plan.launch.launcher == "deepspeed":
            hosts = shlex.quote(plan.launch.hostfile) if plan.launch.hostfile else '"${HOSTFILE:?}"'
            command = f"deepspeed{'' if starts_over_ssh(plan.launch) else f' --no_ssh {rank}'} --hostfile {hosts}"
            command += f" --num_nodes {nodes} --num_gpus {count} {where} --no_local_rank {SCRIPT}"
    elif plan.launch.launcher == "deepspeed":
        # An absent hostfile means this machine; the default is one that a cluster may have left in /job.
        command = f"deepspeed --num_gpus {count} --hostfile no-hostfile {where} --no_local_rank {SCRIPT}"
    elif plan.launch.launcher == "torchrun":
        command = f"torchrun --nnodes 1 --nproc_per_node {count} {where} {SCRIPT}"
    else:
        command = f"python {SCRIPT}"
    exports = [f"export {k}={shlex.quote(v)}" for k, v in env.items()]
    if plan.launch.launcher == "local" and plan.deepspeed:  # it asks MPI for its rank where these are not set
        exports.append(
            f"export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
        )
    if plan.launch.launcher == "local" and not plan.trainer["use_cpu"]:
        # One process that sees several GPUs would be wrapped in DataParallel: the first of them is enough.
        exports.append('CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"')
        exports.append('export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"')
    lines = ["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"', f"export {quiet}", *exports, f"exec {command}"]
    return "\n".join(lines) + "\n"
