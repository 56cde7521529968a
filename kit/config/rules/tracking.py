"""The rules about experiment trackers: named one by one, installed, and what leaves this machine."""

from __future__ import annotations

from importlib.util import find_spec

from kit.config.rules.context import RuleContext, Violations
from kit.schema.trackers import KEY, KNOWN, OURS, tracker_names


def whatever_is_installed(run: RuleContext) -> Violations:
    if "all" in tracker_names(run.plan["trainer"].get("report_to")):
        yield (
            "report_to=all reports to whatever happens to be installed where the run starts",
            KEY,
            f"name them: tracking=tensorboard, or {KEY}=[tensorboard,wandb]",
        )


def missing(run: RuleContext) -> Violations:
    for name in tracker_names(run.plan["trainer"].get("report_to")):
        package = KNOWN.get(name)
        if package and find_spec(package) is None:
            fix = f"pip install 'finetune-kit[{name}]'" if name in OURS else f"pip install {package}"
            yield f"{name} is not installed", KEY, f"{fix}, or tracking=none"


def online(run: RuleContext) -> Violations:
    for name in tracker_names(run.plan["trainer"].get("report_to")):
        if name in KNOWN and name not in OURS:
            yield (
                f"{name} sends what its own settings say: the kit keeps only {', '.join(OURS)} on this machine",
                KEY,
                "tracking=none keeps metrics.jsonl alone",
            )
