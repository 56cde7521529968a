"""What may stand in the lines of a SLURM script, and what is wrong with what was given.

A `#SBATCH` line cannot be quoted: a newline ends it and blanks part it. So every value that reaches one matches a
narrow pattern, and a value that does not is refused, here and once more where the script is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from kit.system.secrets import is_secret

WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
PATTERNS = {  # key of launch.slurm, which is also sbatch's option: what its value looks like
    "partition": (rf"{WORD}(,{WORD})*", "names, such as gpu or gpu,long"),
    "account": (WORD, "a name"),
    "qos": (WORD, "a name"),
    "gres": (r"[A-Za-z0-9_][A-Za-z0-9_.:,/=-]*", "such as gpu:4 or gpu:a100:4"),
    "time": (r"(\d+-)?\d+(:\d+){0,2}", "minutes, HH:MM:SS or D-HH:MM:SS"),
    "mem": (r"\d+[KMGT]?", "such as 64G; 0 is all of the node"),
    # SLURM's own and, or and counts: the line is a comment to the shell.
    "constraint": (r"[A-Za-z0-9_\[(][A-Za-z0-9_.,&|*()\[\]-]*", "features, such as a100 or a100&nvlink"),
    "exclude": (r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "nodes, such as node3 or node[01-04]"),
}
SCRIPT_FIX = "write it into a file, and: source /path/setup.sh"
# Plain too, as the run's directory stands behind --output; % is SLURM's own.
PATH = re.compile(r"/[A-Za-z0-9_.,/+@=:-]+")
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}")
EXTRA = re.compile(r"--([a-z][a-z0-9-]*)(=[A-Za-z0-9_.,:/@%+=-]+)?")
# Options that the script sets itself, and those that would put the environment, or another script, into it.
WRITTEN_OPTIONS = {
    "job-name", "output", "error", "open-mode", "nodes", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "signal",
    "requeue", "no-requeue", "array", "dependency", "parsable", "wrap", "export", "export-file", "get-user-env",
    "chdir", "wait", "input", "cpus-per-task", "test-only", "propagate", "uid", "gid", *PATTERNS,
}  # fmt: skip
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Found = Iterator[tuple[str, str, str]]


def slurm_value_problems(slurm: dict[str, Any]) -> Found:
    """(problem, key, fix) of every value that cannot stand in an `#SBATCH` line, or in the script's words."""
    for name, (pattern, example) in PATTERNS.items():
        value, key = slurm.get(name), f"launch.slurm.{name}"
        # YAML 1.1 reads 12:00:00 as a number to the base of 60, which SLURM would take for minutes.
        if isinstance(value, int) and name == "time" and value % 60 == 0 and value >= 3600:
            hours = f"{value // 3600}:{value // 60 % 60:02}:00"
            text = f"{key}={value} minutes are {value / 1440:.1f} days; YAML reads an unquoted {hours} so"
            yield text, key, f"{key}='D-HH:MM:SS', in quotes"
        elif value is not None and not re.fullmatch(pattern, str(value), re.ASCII):
            yield f"{key}={value!r} cannot stand in an #SBATCH line", key, example
    for name in ("modules", "setup"):
        for number, line in enumerate(slurm.get(name) or []):
            key = f"launch.slurm.{name}[{number}]"
            if CONTROL.search(line) or not line.strip():
                yield f"{key}={line!r} is empty or holds a control character", key, "one command to an entry"
            elif name == "setup" and not is_shell_words(line):
                yield f"{key}={line!r} has a quote that is not closed", key, "close it"
            elif name == "setup" and (variable := secret_variable(line)):
                text = f"{key} gives {variable} a value that would stand in the script"
                yield text, key, f"hf auth login, or source a file of yours that sets {variable}"
            elif name == "setup" and (sign := unquoted_shell_sign(line)):
                yield f"{key}={line!r}: the shell would not see {sign!r}, as each word is quoted", key, SCRIPT_FIX
            elif name == "modules" and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/@=:-]*", line, re.ASCII):
                yield f"{key}={line!r} is no module's name", key, "such as cuda/12.4"


def is_shell_words(line: str) -> bool:
    try:
        return bool(shlex.split(line))
    except ValueError:
        return False


def unquoted_shell_sign(line: str) -> str:
    """The first sign in a set-up line that a shell would act on, "" for none: quoted, it is a letter as others are."""
    single = re.sub(r"\\.|'[^']*'", "_", line)
    bare = re.sub(r'"[^"]*"', "_", single)
    match = re.search(r"[$`]", single) or re.search(r"[;&|<>()]|(?<![^\s=:])[~#]", bare)
    return match[0] if match else ""


def secret_variable(line: str) -> str:
    """The name of a variable that a set-up line gives a secret, "" for none."""
    pairs = (word.partition("=") for word in shlex.split(line))
    return next((name for name, equals, value in pairs if equals and value and is_secret(name, value)), "")


def slurm_extra_problems(slurm: dict[str, Any]) -> Found:
    """The same of launch.slurm.extra: options of sbatch that the kit has no key for."""
    for number, option in enumerate(slurm.get("extra") or []):
        key = f"launch.slurm.extra[{number}]"
        match = EXTRA.fullmatch(option)
        if not match:
            yield f"{key}={option!r} is no long option of sbatch", key, "such as --reservation=name, without blanks"
        # sbatch takes any beginning of a name that is clear: --expor is --export.
        elif owned := sorted(name for name in WRITTEN_OPTIONS if name.startswith(match[1])):
            yield f"{key}={option!r}: the kit writes --{owned[0]} itself", key, fix_for_option(owned[0])


def fix_for_option(option: str) -> str:
    known = {"nodes": "launch.num_nodes=N", "cpus-per-task": "launch.slurm.cpus_per_task=N", "chdir": "cd there first"}
    known |= {"signal": "launch.slurm.signal_seconds=N", "requeue": "launch.slurm.max_requeues=N"}
    known |= {name: f"launch.slurm.{name}=..." for name in PATTERNS}
    return known.get(option, "leave it out")


def gpus_of(gres: Any) -> int | None:
    """How many GPUs per node a gres value asks for; None where it names none."""
    counts = [re.fullmatch(r"gpu(?::[^:,]+)??(?::(\d+))?", part) for part in str(gres or "").split(",")]
    gpus = [int(m[1] or 1) for m in counts if m]
    return sum(gpus) if gpus else None
