"""The verbs that describe and start a run: train, check, resume, fetch, and compose for the ranks."""

from __future__ import annotations

import json
import sys

from kit.config.flags import parse_words, refuse_unknown_flags
from kit.errors import DONE, REFUSED, KitError
from kit.system.terminal import print_problems, verb_parser

TAKING = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp",
          "--info", "-i", "--experimental-rerun")  # fmt: skip
HYDRA_FLAGS = (*TAKING, "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m",
               "--shell-completion", "-sc")  # fmt: skip
EXCLUSIVE_FLAGS = ("-m", "--multirun", "-r", "--run", "-c", "--cfg", "-i", "--info")


def train_verb(argv: list[str]) -> int:
    """`kit train`: our own flags first; any other flag hands the line to Hydra."""
    if argv in (["--help"], ["-h"]):
        print(
            "usage: kit train [run.yaml] [DATA ...] [key=value ...] [--fresh] [--config-dir DIR] [Hydra's own flags]\n"
        )
        print("  DATA      a file, a folder or a glob: dataset.path; several are one data set")
        print("  --fresh   a new directory although the same run is there, unfinished")
        print("  --follow  with launch=slurm: stay, show the job's log and end as it ends")
        print("  --then merge,eval,generate   with launch=slurm: jobs that start once the one before is done")
        print("\nHydra's own flags:")
        from kit.config.compose import run_hydra

        return run_hydra(["--hydra-help"])
    fresh, follow, then, argv = split_train_flags(argv)
    from kit import api

    refuse_unknown_flags(argv, HYDRA_FLAGS, "train", TAKING)
    if not any(a.startswith("-") for a in argv):
        return api.train(*argv, fresh=fresh, follow=follow, then=then)
    alone = [a for a in argv if a.partition("=")[0] in EXCLUSIVE_FLAGS]
    if len(alone) > 1:
        raise KitError(f"{alone[0]} and {alone[1]} exclude each other", "command line", "type one of them")
    if "--resolve" in argv and not {"--cfg", "-c"} & {a.partition("=")[0] for a in argv}:
        raise KitError("--resolve says how --cfg prints", "command line", "--cfg job --resolve")
    if any(a in ("-m", "--multirun") or a.replace(" ", "").lower() == "hydra.mode=multirun" for a in argv):
        if follow or then:
            raise KitError("--follow and --then are for one run, not for a sweep", "command line", "leave them out")
        from kit.sweeps import grid

        return grid.run_sweep(argv, fresh)
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


def split_train_flags(argv: list[str]) -> tuple[bool, bool, list[str], list[str]]:
    """(--fresh, --follow, the verbs of --then, the words that are left)."""
    then: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--then" or word.startswith("--then="):
            named = [v for v in (word[7:] or next(words, "")).split(",") if v]
            if not named:
                raise KitError("--then names no verb", "--then", "--then merge,eval,generate, or some of them")
            then += named
        elif word not in ("--fresh", "--follow"):
            rest.append(word)
    return "--fresh" in argv, "--follow" in argv, then, rest


def check_verb(argv: list[str]) -> int:
    if any(a.partition("=")[0] == "--deepspeed" for a in argv):  # somebody's DeepSpeed JSON by itself
        from kit.cli import check_deepspeed

        return check_deepspeed.check_deepspeed(argv)
    parser = verb_parser("check", "Everything that can be known about a run without weights; imports no torch.")
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | DATA | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--json", action="store_true", help="the problems, or the plan, as JSON")
    parser.add_argument("--here", action="store_true", help="also ask whether this machine's hardware will do")
    parser.add_argument("--rules", action="store_true", help="every rule, a line to each")
    parser.add_argument("--explain", metavar="RULE", help="what a rule is about, and where the knowledge comes from")
    parser.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON by itself: its faults, autos and --fix")
    a = parse_words(parser, argv)
    if a.rules or a.explain:
        from kit.config.rules import explain

        print(explain.explain_rule(a.explain) if a.explain else explain.list_rules())
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


def compose_verb(argv: list[str]) -> int:
    """For kit.worker: make the run directory of overrides and answer with one line of JSON."""
    parser = verb_parser("compose", "Compose and freeze a run without starting it; prints one line of JSON.")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--fresh", action="store_true")
    a = parser.parse_args(argv)
    from kit import api
    from kit.storage import run_directory

    try:
        plan = run_directory.create_run_directory(
            api.compose(*a.overrides, here=True, world_size=a.world_size), a.fresh
        )
        for line in api.warning_lines(plan):  # standard error reaches the user, standard output the ranks
            print(f"kit: warning: {line}", file=sys.stderr)
        print(json.dumps({"plan": str(plan.run_path / run_directory.PLAN)}))
        return DONE
    except KitError as error:
        print(json.dumps({"code": error.code, "problems": error.to_json()}))
        return error.code


def resume_verb(argv: list[str]) -> int:
    parser = verb_parser("resume", "Continue a run from its newest complete checkpoint.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="extendable and machine keys")
    a = parse_words(parser, argv)
    from kit import api

    return api.resume(a.run, *a.overrides)


def fetch_verb(argv: list[str]) -> int:
    parser = verb_parser(
        "fetch", "Bring a run's model, tokenizer and data into the Hub cache, where there is a network."
    )
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | DATA | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    a = parse_words(parser, argv)
    from kit.hub.fetch import fetch as fetch_run

    return fetch_run(*a.overrides, config_dir=a.config_dir, dry_run=a.dry_run)
