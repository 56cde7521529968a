"""The command `kit`. Verbs import what they need when they run: `kit --help` and `kit check` never load torch."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.errors import DONE, ENVIRONMENT, FAILED, REFUSED, KitError, Problem
from kit.terminal import print_problems, progress, quiet, read_prompts

USAGE = """\
usage: kit VERB ...

  train     [run.yaml] [key=value ...]   compose, check, launch, train, save the adapter
  check     [run.yaml] [key=value ...]   everything that can be known without weights, all problems at once
  resume    RUN [key=value ...]          continue from the newest complete checkpoint
  launch-node PLAN --node-rank N         the ranks of one node of several, where no ssh starts them
  merge     RUN | ADAPTER --base MODEL   fold the adapter into the base, verified
  generate  RUN | ADAPTER | MODEL        the same prompts from base, adapter and merged model
  eval      RUN | ADAPTER | MODEL        exact match, loss and perplexity on the held-out rows
  fetch     [run.yaml] [key=value ...]   model, tokenizer and data into the Hub cache, for runs without a network
  convert   DIR OUT                      Meta's own checkpoint, or pytorch_model*.bin, to safetensors
  watch     RUN | SWEEP                  a run while it trains: loss, speed, memory, slowest rank, time left
  doctor    [RUN]                        what on this machine would stop a run; of a failed run, the cause and the fix
  import    FILE... | COMMAND ...        another tool's config or command line as a recipe, and what is not in it
  list      [GROUP]                      recipes, or the choices of a group
  show      RECIPE | GROUP/NAME          one of them as it is written, and what a recipe composes to
  why       KEY [RUN | overrides]        a value: where it was set and over what, what it becomes, which rules read it
  diff      A B                          what differs between two recipes, run.yaml files, plans or runs
  eject     [RUN | overrides] [OUT_DIR]  the plain TRL script, ds_config.json and launch command of a plan

  kit VERB --help shows the options of a verb; all of Hydra's own work on `kit train` (-m, --cfg job, --info, ...).
  Exit codes: 0 done, 2 refused, 3 environment, 4 failed, 75 stopped with a complete checkpoint.
"""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command; exits with the codes of kit.errors."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in ("check", "why", "diff", "show"):
        gc.disable()  # over in half a second: collecting costs 4 % of it and frees nothing that is missed
    sys.exit(run(argv))


def run(argv: list[str]) -> int:
    """The exit code of one command line; every KitError is printed as problem, where, fix."""
    if any(a in ("-sc", "--shell-completion") for a in argv):
        return complete(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return DONE
    if argv[0] in ("-V", "--version"):
        from kit import __version__

        print(f"kit {__version__}")
        return DONE
    from kit.hub import no_telemetry

    no_telemetry()
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, 1)
            raise KitError(f"there is no verb {verb!r}", "command line", f"kit {near[0]}" if near else "kit --help")
        return VERBS[verb](rest)
    except KitError as error:
        print_problems(error.problems, refused=error.code == REFUSED)
        return error.code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            where = str(error.filename or "")
            print_problems([Problem(f"the system refused: {error.strerror or error}", where)], refused=False)
            return ENVIRONMENT
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def train(argv: list[str]) -> int:
    """`kit train`: our own flags first; any other flag hands the line to Hydra."""
    if argv in (["--help"], ["-h"]):
        print("usage: kit train [run.yaml] [key=value ...] [--fresh] [--config-dir DIR] [Hydra's own flags]\n")
        print("  --fresh   a new directory although the same run is there, unfinished")
        print("  --follow  with launch=slurm: stay, show the job's log and end as it ends")
        print("  --then merge,eval,generate   with launch=slurm: jobs that start once the one before is done")
        print("\nHydra's own flags:")
        from kit.config.compose import run_hydra

        return run_hydra(["--hydra-help"])
    fresh, follow, then, argv = train_flags(argv)
    from kit import api

    if not any(a.startswith("-") for a in argv):
        return api.train(*argv, fresh=fresh, follow=follow, then=then)
    if any(a in ("-m", "--multirun") or a.replace(" ", "").lower() == "hydra.mode=multirun" for a in argv):
        if follow or then:
            raise KitError("--follow and --then are for one run, not for a sweep", "command line", "leave them out")
        from kit.launchers import sweep

        return sweep.main(argv, fresh)
    from kit.config.compose import Composed, run_hydra
    from kit.config.plan import build_plan

    codes: list[int] = []

    def one(composed: Composed) -> None:
        try:
            codes.append(api.train(plan=build_plan(composed, here=True), fresh=fresh, follow=follow, then=then))
        except KitError as error:  # raised through Hydra it would be printed as a traceback
            print_problems(error.problems, refused=error.code == REFUSED)
            codes.append(error.code)

    code = run_hydra(argv, one)
    return codes[0] if codes else (REFUSED if code else DONE)


def train_flags(argv: list[str]) -> tuple[bool, bool, list[str], list[str]]:
    """(--fresh, --follow, the verbs of --then, the words that are left)."""
    then: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--then" or word.startswith("--then="):
            then += [v for v in (word[7:] or next(words, "")).split(",") if v]
        elif word not in ("--fresh", "--follow"):
            rest.append(word)
    return "--fresh" in argv, "--follow" in argv, then, rest


def check(argv: list[str]) -> int:
    if any(a.partition("=")[0] == "--deepspeed" for a in argv):  # somebody's DeepSpeed JSON by itself
        from kit import check_deepspeed

        return check_deepspeed.main(argv)
    parser = options("check", "Everything that can be known about a run without weights; imports no torch.")
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--json", action="store_true", help="the problems, or the plan, as JSON")
    parser.add_argument("--here", action="store_true", help="also ask whether this machine's hardware will do")
    parser.add_argument("--rules", action="store_true", help="every rule, a line to each")
    parser.add_argument("--explain", metavar="RULE", help="what a rule is about, and where the knowledge comes from")
    parser.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON by itself: its faults, autos and --fix")
    a = parser.parse_intermixed_args(argv)
    if a.rules or a.explain:
        from kit.config import explain

        print(explain.explain(a.explain) if a.explain else explain.listing())
        return DONE
    from kit import api

    try:
        plan = api.compose(*a.overrides, config_dir=a.config_dir, here=a.here)
    except KitError as error:
        if not a.json:
            raise
        print(json.dumps({"valid": False, "problems": error.to_json()}, indent=1))
        return error.code
    if a.json:
        print(json.dumps({"valid": True, "problems": [], "plan": plan.model_dump()}, indent=1))
        return DONE
    for key, value in api.plan_summary(plan).items():
        for line in [value] if isinstance(value, str) or not isinstance(value, list) else value:
            print(f"{key:<10} {line}")
    if plan.warnings:
        print("\nkit check --explain RULE tells more about a [rule]", file=sys.stderr)
    print("valid")
    return DONE


def compose(argv: list[str]) -> int:
    """For kit.worker: make the run directory of overrides and answer with one line of JSON."""
    parser = options("compose", "Compose and freeze a run without starting it; prints one line of JSON.")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--fresh", action="store_true")
    a = parser.parse_args(argv)
    from kit import api, rundir

    try:
        plan = rundir.create(api.compose(*a.overrides, here=True, world_size=a.world_size), a.fresh)
        for line in api.warnings(plan):  # standard error reaches the user, standard output the ranks
            print(f"kit: warning: {line}", file=sys.stderr)
        print(json.dumps({"plan": str(plan.run_path / rundir.PLAN)}))
        return DONE
    except KitError as error:
        print(json.dumps({"code": error.code, "problems": error.to_json()}))
        return error.code


def resume(argv: list[str]) -> int:
    parser = options("resume", "Continue a run from its newest complete checkpoint.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="extendable and machine keys")
    a = parser.parse_intermixed_args(argv)
    from kit import api

    return api.resume(a.run, *a.overrides)


def merge(argv: list[str]) -> int:
    parser = options("merge", "Fold a LoRA adapter into its base, shard by shard on the CPU.")
    parser.add_argument("source", help="a run directory, an adapter folder, or a Hub id in the cache")
    parser.add_argument("--base", help="the base model, for an adapter that the kit did not make")
    parser.add_argument("--revision")
    parser.add_argument("--out", help="where the merged model goes (RUN/merged)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights (the base's)"
    )
    parser.add_argument(
        "--onto", choices=["original", "dequantized"],
        help="for a run over a quantized base: the stored weights (default), or what quantizing left of them",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=["auto", "logits", "tensors", "no"], default="auto", nargs="?", const="logits"
    )
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--no-fsync", action="store_true", help="leave flushing to the system")
    a = parse_or_submit(parser, "merge", argv)
    quiet()
    from kit.merging import merge as merge_adapter
    from kit.merging.report import format_merge

    verify: bool | str = {"auto": True, "no": False}.get(a.verify, a.verify)
    source = run_or_path(a.source)
    result = merge_adapter(
        source, a.base, a.out, revision=a.revision, verify=verify, dtype=a.dtype, onto=a.onto,
        fsync=not a.no_fsync, overwrite=a.overwrite, progress=progress("merging"),
    )  # fmt: skip
    print(format_merge(result))
    return DONE


def generate(argv: list[str]) -> int:
    parser = options("generate", "The same prompts through base, adapter and merged model, side by side.")
    source_options(parser)
    parser.add_argument("--prompts", help="a file with one prompt per line, or - for standard input")
    parser.add_argument("--prompt", action="append", help="one prompt; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", help="a system message before every prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: the prompt as it is")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", help="samples.json goes here (RUN)")
    a = parse_or_submit(parser, "generate", argv)
    quiet()
    from kit.generate import format_samples
    from kit.generate import generate as generate_samples

    prompts = list(a.prompt or [])
    if a.prompts:
        prompts += read_prompts(a.prompts)
    result = generate_samples(
        run_or_path(a.source), base=a.base, revision=a.revision, prompts=prompts or None, which=a.which, raw=a.raw,
        max_new_tokens=a.max_new_tokens, temperature=a.temperature, top_p=a.top_p, seed=a.seed, system=a.system,
        batch_size=a.batch_size, out=Path(a.out) if a.out else None,
    )  # fmt: skip
    print(format_samples(result["samples"]))
    if result.get("adapter_equals_merged") is not None:
        print(f"adapter and merged model agree token for token: {result['adapter_equals_merged']}")
    return DONE


def evaluate(argv: list[str]) -> int:
    parser = options("eval", "Exact match, loss and perplexity on the held-out rows.")
    source_options(parser)
    parser.add_argument("--data", help="a file of rows instead of the run's held-out split")
    parser.add_argument("--limit", type=int, help="at most this many rows")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--few-shot", type=int, default=0, help="also the base with this many worked examples")
    parser.add_argument("--json", action="store_true")
    a = parse_or_submit(parser, "eval", argv)
    quiet()
    from kit.evaluate import evaluate as evaluate_models
    from kit.evaluate import format_table

    result = evaluate_models(
        run_or_path(a.source), base=a.base, revision=a.revision, data=a.data, which=a.which, limit=a.limit,
        max_new_tokens=a.max_new_tokens, batch_size=a.batch_size, few_shot=a.few_shot,
    )  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False) if a.json else format_table(result))
    return DONE


def fetch(argv: list[str]) -> int:
    parser = options("fetch", "Bring a run's model, tokenizer and data into the Hub cache, where there is a network.")
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    a = parser.parse_intermixed_args(argv)
    from kit.fetch import fetch as fetch_run

    return fetch_run(*a.overrides, config_dir=a.config_dir, dry_run=a.dry_run)


def convert(argv: list[str]) -> int:
    parser = options("convert", "Meta's own Llama checkpoint, or pickled weights, to safetensors, in bounded memory.")
    parser.add_argument(
        "source",
        metavar="DIR",
        help="the folder of params.json and consolidated.*.pth, or of pytorch_model*.bin",
    )
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (as stored)")
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="the largest file, in 1e9 bytes (4); pickles stay one file each"
    )
    parser.add_argument("--max-position-embeddings", type=int, help="the context length (that of the generation)")
    parser.add_argument("--verify-checklist", action="store_true", help="first compare md5s with checklist.chk")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that this verb made")
    parser.add_argument("--no-fsync", action="store_true", help="do not wait for the disk")
    a = parser.parse_args(argv)
    quiet()
    from kit import rundir
    from kit.converting import convert as convert_checkpoint

    report = convert_checkpoint(
        a.source, a.out, dtype=a.dtype, shard_gb=a.shard_gb, max_position_embeddings=a.max_position_embeddings,
        verify_checklist=a.verify_checklist, overwrite=a.overwrite, fsync=not a.no_fsync,
        progress=progress("converting"),
    )  # fmt: skip
    size = f"{report['parameters'] / 1e9:.2f} B parameters, {report['dtype']}, {report['bytes'] / 1e9:.1f} GB"
    print(f"converted {rundir.shown(report['out'])} ({size}, {report['seconds']:.1f} s)")
    for note in report["notes"]:
        print(f"note      {note}")
    return DONE


def doctor(argv: list[str]) -> int:
    from kit.doctor.cli import main as doctor_main

    return doctor_main(argv)


def watch(argv: list[str]) -> int:
    from kit.watching.main import main as watch_main

    return watch_main(argv)


def list_choices(argv: list[str]) -> int:
    parser = options("list", "Recipes, or the choices of a group, each with its first line.")
    parser.add_argument("group", nargs="?", default="recipe")
    a = parser.parse_args(argv)
    from kit import catalog

    print(catalog.list_group(a.group), end="")
    if a.group == catalog.RECIPE:  # not among the names that a script reads
        print(f"\nkit list GROUP: {', '.join(g for g in catalog.groups() if g != catalog.RECIPE)}", file=sys.stderr)
    return DONE


def show(argv: list[str]) -> int:
    parser = options(
        "show", "A recipe or a choice of a group as it is written; for a recipe also what it composes to."
    )
    parser.add_argument("name", metavar="RECIPE | GROUP/NAME | NAME")
    a = parser.parse_args(argv)
    from kit import catalog

    print(catalog.show(a.name), end="")
    return DONE


def why(argv: list[str]) -> int:
    from kit.why import main as why_main

    return why_main(argv)


def diff(argv: list[str]) -> int:
    from kit.diff import main as diff_main

    return diff_main(argv)


def eject(argv: list[str]) -> int:
    from kit.ejecting.verb import main as eject_main

    return eject_main(argv)


def source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run directory, an adapter folder, a model folder, or a Hub id in the cache")
    parser.add_argument("--base", help="the base model of an adapter folder")
    parser.add_argument("--revision")
    parser.add_argument("--which", action="append", choices=["base", "adapter", "merged", "model"])


def options(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"kit {verb}", description=description, allow_abbrev=False)


def parse_or_submit(parser: argparse.ArgumentParser, verb: str, argv: list[str]) -> argparse.Namespace:
    """The parsed words; with launch=slurm among them the rest is submitted as a batch job, and this process ends."""
    parser.epilog = (
        "launch=slurm [launch.slurm.KEY=VALUE ...] makes it a SLURM job, with the run's own launch.slurm.* below; "
        "--follow then shows its log."
    )
    words = [a for a in argv if a.startswith(("launch=", "launch."))]
    a = parser.parse_args([x for x in argv if x not in words and not (words and x == "--follow")])
    if words:
        from kit.launchers import slurm

        rest = [x for x in argv if x not in words and x != "--follow"]
        sys.exit(slurm.submit_verb(verb, run_or_path(a.source), rest, words, "--follow" in argv))
    return a


def run_or_path(name: str) -> str:
    """A run may be named without its folder, as `kit resume` takes it."""
    from kit import rundir

    inside = Path("runs") / name
    return str(inside) if not Path(name).exists() and (inside / rundir.PLAN).is_file() else name


def complete(argv: list[str]) -> int:
    """Hydra's shell completion: it knows overrides, not our verb, so the verb is taken out of the typed line."""
    from kit.config.compose import run_hydra

    line = os.environ.get("COMP_LINE")
    if line is not None:
        words = line.split(" ")
        if len(words) > 1 and words[1] == "train":
            os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return run_hydra([a for a in argv if a != "train"])


def import_config(argv: list[str]) -> int:
    from kit.importing.main import main as import_main

    return import_main(argv)


def launch_node(argv: list[str]) -> int:
    from kit.launchers.node import main as launch_node_main

    return launch_node_main(argv)


VERBS: dict[str, Callable[[list[str]], Any]] = {
    "train": train,
    "check": check,
    "resume": resume,
    "merge": merge,
    "generate": generate,
    "eval": evaluate,
    "fetch": fetch,
    "convert": convert,
    "watch": watch,
    "doctor": doctor,
    "list": list_choices,
    "show": show,
    "why": why,
    "diff": diff,
    "eject": eject,
    "import": import_config,
    "launch-node": launch_node,
    "compose": compose,
}
