"""Finds for each kind and number of GPUs how a run trains on them best, its time and its cost."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from kit.config.compose import Composed, compose
from kit.config.memory_choice import option_of
from kit.config.plan import build_plan
from kit.config.report import Report
from kit.errors import KitError
from kit.explain.plan import CHANGES, forecast_composed
from kit.explain.plan_text import Figures, durations, fits, gb
from kit.forecast.hosts import Host
from kit.schema.run_plan import RunPlan
from kit.system import hardware

ENGINE = CHANGES[1]
# Beside CHANGES[0]: where a recipe names the accumulation, rows of a micro-step are free only without it.
MEMORY = (*CHANGES[0], "~trainer.gradient_accumulation_steps")
Run = tuple[str, ...]  # a command line


@dataclass(frozen=True)
class Question:
    """What is asked: seconds, money, how many GPUs of a kind (empty: not said), and the price of each kind."""

    deadline: float | None
    budget: float | None
    counts: tuple[int, ...]
    prices: dict[str, float]


@dataclass(frozen=True)
class Planner:
    """A command line composed, and its plan on a host; each made once."""

    tree_of: Callable[[Run], Composed]
    plan_of: Callable[[Run, Host], RunPlan]


def make_planner(config_dir: str | None) -> Planner:
    """Return a planner that composes a command line once for all GPUs, for nothing in it depends on them.

    A plan depends on nothing of a GPU but its memory and compute capability: those of the same share it.
    """
    plans: dict[tuple[Any, ...], RunPlan] = {}

    @cache
    def tree_of(run: Run) -> Composed:
        tree = compose(list(run), config_dir)
        gone = {word[1:] for word in run if word.startswith("~")}  # nobody chose what is left out
        return replace(tree, provenance={key: place for key, place in tree.provenance.items() if key not in gone})

    def plan_of(run: Run, host: Host) -> RunPlan:
        key = (run, host.count, host.memory_gib, host.capability)
        if key not in plans:
            with hardware.assume_gpus(host.gpus):
                plans[key] = build_plan(tree_of(run), here=False)
        return plans[key]

    return Planner(tree_of, plan_of)


def search(words: Sequence[str], hosts: Sequence[Host], question: Question, config_dir: str | None) -> Figures:
    """Return the options, the cheapest that meets all first; KitError where all are refused for the same reason."""
    planner = make_planner(config_dir)
    given = tuple(word for word in words if not re.match(r"[+~]*launch[.=]", word))
    kept = batch_to_keep(tuple(words), given, hosts, planner)
    given = (*given, f"global_batch_size={kept}") if kept else given
    options, refusals = [], {}
    for host in hosts:
        try:
            options.append(find_option(given, host, question, planner))
        except KitError as error:
            refusals[str(error)] = error
            options.append({"gpu": host.kind(), "count": host.count, "price": host.price,
                            "refused": error.problems[0].problem, "fix": error.problems[0].fix})  # fmt: skip
    if len(refusals) == 1 and all("refused" in option for option in options):
        raise next(iter(refusals.values()))
    priced = any(host.price is not None for host in hosts)

    def rank(option: Figures) -> tuple[Any, ...]:
        if "refused" in option:
            return 3, option["gpu"], option["count"]
        worth = (option["cost"] or [0, float("inf")])[1] if priced else option["gpu_hours"][1]
        return (0 if not option["reasons"] else 1 if option["fits"] else 2), worth, option["seconds"][1]

    options.sort(key=rank)
    affordable = [o for o in options if o.get("fits") and not misses_budget(o["cost"], question.budget)]
    return {
        "deadline": question.deadline, "budget": question.budget, "ranked_by": "cost" if priced else "GPU hours",
        "cheapest": options[0] if options[0].get("reasons") == [] else None,
        "fastest": min(affordable, key=lambda o: o["seconds"][1], default=None), "options": options,
        "notes": [f"global_batch_size={kept} everywhere: what the run has as typed"] if kept else [],
    }  # fmt: skip


def batch_to_keep(words: Run, given: Run, hosts: Sequence[Host], planner: Planner) -> int | None:
    """Return the global batch of the run as typed, with which every number of GPUs does the same work.

    None where the run says it. The fewest GPUs stand for launch.num_gpus=auto.
    """
    tree = planner.tree_of(words).tree
    count = (tree.get("launch") or {}).get("num_gpus")
    for host in () if tree.get("global_batch_size") else sorted(hosts, key=lambda host: host.count):
        host = replace(host, count=count) if isinstance(count, int) and count > 0 else host
        with contextlib.suppress(KitError):
            return planner.plan_of(start_on(given, host), host).global_batch_size
    return None


def start_on(given: Run, host: Host) -> Run:
    """Return the command line for a number of GPUs; how they start is the kit's to choose.

    A recipe or a file for one GPU says local, by the group or by its key.
    """
    return (*given, "launch=auto", "launch.launcher=auto", f"launch.num_gpus={host.count}")


def find_option(given: Run, host: Host, question: Question, planner: Planner) -> Figures:
    """Return how a run does on a host: as given where that meets all, else with the fastest way that fits."""
    best: Figures | None = None
    refused: KitError | None = None
    for run in candidates(start_on(given, host), host, planner):
        try:
            plan = planner.plan_of(run, host)
            figures = forecast_composed(plan, host)
        except KitError as error:  # what deepspeed=auto is refused for says less of the run
            refused = error if refused is None or ENGINE[0] not in run else refused
            continue
        if "total" not in figures:
            fix = "trainer.max_steps=N, or data that is here"
            raise KitError("the rows of an epoch are not known here: no time, no cost", "trainer.max_steps", fix)
        option = describe_option(run, plan, host, figures, question)
        if best is None or order_ways(option) < order_ways(best):
            best = option
        if not option["reasons"]:
            return option
    if best is None:
        assert refused
        raise refused
    return best


def order_ways(option: Figures) -> tuple[bool, float]:
    """Return what the ways to train on a host are ordered by: those that fit, then time, else memory."""
    return (False, option["seconds"][1]) if option["fits"] else (True, option["needed"])


def candidates(run: Run, host: Host, planner: Planner) -> Iterator[Run]:
    """Return the command lines to try, all of one batch: as given, "auto" memory, "auto" engine, both."""
    yield run
    tree = planner.tree_of(run)
    memory: Run = ()
    if any(Report(tree.provenance).chosen(change.partition("=")[0].lstrip("~")) for change in MEMORY):
        with contextlib.suppress(KitError):  # the run as given is refused: it has no batch to keep
            batch = tree.tree.get("global_batch_size") or planner.plan_of(run, host).global_batch_size
            memory = (*MEMORY, f"global_batch_size={batch}")
    for change in dict.fromkeys((memory, ENGINE, (*memory, *ENGINE))):
        if change:
            keys = {word.partition("=")[0].lstrip("~") for word in change}
            yield (*[word for word in run if word.partition("=")[0].lstrip("+") not in keys], *change)


def describe_option(run: Run, plan: RunPlan, host: Host, figures: Figures, question: Question) -> Figures:
    """Return the figures of one option, with the reasons for which it does not do."""
    memory, total = figures["memory"], figures["total"]
    limit, on_host = memory["limit"], figures["host_memory"]
    reasons = []
    if not memory["fits"]:
        reasons.append(f"does not fit: {gb(memory['needed'])} of {gb(limit)} GB")
    elif not fits(figures):
        reasons.append(f"host memory: {gb(on_host['needed'])} of {gb(on_host['available'])} GB")
    else:
        if question.deadline is not None and total["seconds"][1] > question.deadline:
            reasons.append(durations(total["seconds"]))
        if misses_budget(total["cost"], question.budget):
            reasons.append("cost {:,.2f} to {:,.2f}".format(*total["cost"]) if total["cost"] else "no price")
    return {
        "gpu": host.kind(), "count": host.count, "price": host.price, "overrides": plain_words(run, plan),
        "engine": figures["run"]["engine"], "batch": figures["run"]["memory"], "rows": plan.global_batch_size,
        "needed": memory["needed"], "limit": limit, "fits": fits(figures),
        **{key: total[key] for key in ("steps", "tokens", "seconds", "gpu_hours", "cost")}, "reasons": reasons,
    }  # fmt: skip


def plain_words(run: Run, plan: RunPlan) -> list[str]:
    """Return a command line with what "auto" memory came to: no word takes a recipe's accumulation back."""
    if MEMORY[0] not in run:
        return list(run)
    option = option_of(plan)
    kwargs = ",".join(f"{key}:{json.dumps(value)}" for key, value in option.activation_checkpointing_kwargs.items())
    return [
        *(word for word in run if word not in MEMORY),
        f"trainer.per_device_train_batch_size={option.per_device_train_batch_size}",
        f"trainer.gradient_accumulation_steps={option.gradient_accumulation_steps}",
        f"trainer.activation_checkpointing={json.dumps(option.activation_checkpointing)}",
        *([f"trainer.activation_checkpointing_kwargs={{{kwargs}}}"] if kwargs else []),
    ]


def misses_budget(cost: Sequence[float] | None, budget: float | None) -> bool:
    return budget is not None and (cost is None or cost[1] > budget)
