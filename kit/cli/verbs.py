"""The command `kit`. Verbs import what they need when they run: `kit --help` and `kit check` never load torch."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys

from kit.errors import DONE, ENVIRONMENT, FAILED, REFUSED, KitError, Problem
from kit.system.terminal import print_problems

USAGE = """\
usage: kit VERB ...

  train     [run.yaml] [key=value ...]   compose, check, launch, train, save the adapter
  check     [run.yaml] [key=value ...]   everything that can be known without weights, all problems at once
  plan      [run.yaml] [key=value ...]   memory, time, disk and cost on this machine or another, and what would fit
  data      [DATA ...] [key=value ...]   every row read and judged, with a model also what it will see of them
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


VERBS = {  # module and function, which takes the words after the verb and returns the exit code
    "train": "kit.cli.train:train_verb",
    "check": "kit.cli.train:check_verb",
    "plan": "kit.explain.plan:plan_verb",
    "data": "kit.cli.data:data_verb",
    "resume": "kit.cli.train:resume_verb",
    "merge": "kit.cli.models:merge_verb",
    "generate": "kit.cli.models:generate_verb",
    "eval": "kit.cli.models:evaluate_verb",
    "fetch": "kit.cli.train:fetch_verb",
    "convert": "kit.cli.models:convert_verb",
    "watch": "kit.watching.main:watch_verb",
    "doctor": "kit.doctor.cli:doctor_verb",
    "list": "kit.explain.catalog:list_verb",
    "show": "kit.explain.catalog:show_verb",
    "why": "kit.explain.why:why_verb",
    "diff": "kit.explain.diff:diff_verb",
    "eject": "kit.ejecting.verb:eject_verb",
    "import": "kit.importing.main:import_verb",
    "launch-node": "kit.cli.launch_node:launch_node_verb",
    "compose": "kit.cli.train:compose_verb",
}
SHORT = ("check", "plan", "why", "diff", "show")  # verbs that only look, and end at once


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command; exits with the codes of kit.errors."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a letter is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    short = argv[:1] and argv[0] in SHORT
    if short:
        gc.disable()  # over in half a second: collecting costs 4 % of it and frees nothing that is missed
    code = run_verb(argv)
    if short:  # taking the interpreter apart costs 8 % more, and nothing waits for it there
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_verb(argv: list[str]) -> int:
    """The exit code of one command line; every KitError is printed as problem, where, fix."""
    if any(a in ("-sc", "--shell-completion") for a in argv):
        return complete_shell(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return DONE
    if argv[0] in ("-V", "--version"):
        from kit import __version__

        print(f"kit {__version__}")
        return DONE
    from kit.storage.hub_cache import disable_telemetry

    disable_telemetry()
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, 1)
            raise KitError(f"there is no verb {verb!r}", "command line", f"kit {near[0]}" if near else "kit --help")
        module, _, function = VERBS[verb].partition(":")
        code = int(getattr(importlib.import_module(module), function)(rest))
        sys.stdout.flush()  # a full disk is told of here, and not by a traceback of the interpreter
        return code
    except KitError as error:
        print_problems(error.problems, refused=error.code == REFUSED)
        return error.code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            from kit.storage.disk import describe_os_error

            print_problems([Problem(*describe_os_error(error))], refused=False)
            return ENVIRONMENT
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def complete_shell(argv: list[str]) -> int:
    """Hydra's shell completion: it knows overrides, not our verb, so the verb is taken out of the typed line."""
    from kit.config.compose import run_hydra

    line = os.environ.get("COMP_LINE")
    if line is not None:
        words = line.split(" ")
        if len(words) > 1 and words[1] == "train":
            os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return run_hydra([a for a in argv if a != "train"])
