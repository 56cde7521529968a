"""`kit plan --deadline --budget`: what to rent for a run to end in time and within a budget."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace

from kit.errors import DONE, REFUSED, KitError, Problem
from kit.explain.plan_text import Figures, durations, gb
from kit.explain.rent_search import Question, search
from kit.forecast.hosts import ALIASES, Host, parse_host, read_table
from kit.system.terminal import describe_duration

COUNTS = (1, 2, 4, 8)
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def rent(words: Sequence[str], machine: str | None, a: argparse.Namespace) -> int:
    """Print what to rent for a run; exit code 2 where nothing meets deadline and budget."""
    if a.compare or a.html or a.explain:
        text = "--deadline, --budget, --gpus and --prices ask what to rent"
        raise KitError(text, "command line", "leave out --compare, --html and --explain")
    question = read_question(a)
    hosts, notes = list_hosts(machine, question, a.price, a.config_dir)
    found = search(words, hosts, question, a.config_dir)
    found["notes"] += notes
    print(json.dumps(found, indent=1) if a.json else render_rent(found))
    return DONE if found["cheapest"] else REFUSED


def read_question(a: argparse.Namespace) -> Question:
    """Read the options as typed; KitError with all that are wrong."""
    problems: list[Problem] = []

    def wrong(option: str, text: str, fix: str) -> None:
        problems.append(Problem(f"{option} {text}", option, fix))

    deadline, budget = a.deadline and parse_duration(a.deadline), a.budget and read_number(a.budget)
    if a.deadline and not deadline:
        wrong("--deadline", f"{a.deadline} is no length of time", "--deadline 12h, 90m, 2d or 1h30m")
    if a.budget and budget is None:
        wrong("--budget", f"{a.budget} is no sum", "--budget 200, in the currency of the prices")
    counts = (a.gpus or "").split(",") if a.gpus else []
    if bad := [c for c in counts if not re.fullmatch(r"[1-9]\d{0,2}", c)]:
        wrong("--gpus", f"{a.gpus}: {bad[0]!r} is no number of GPUs from 1 to 999", "--gpus 1,2,4,8")
    prices = {}
    for pair in (a.prices or "").split(",") if a.prices else ():
        name, _, typed = pair.partition("=")
        price = read_number(typed)
        if price is None:
            wrong("--prices", f"{pair} says no price of a GPU hour", "--prices h100=2.5,a100=1.3")
        else:
            word = name.lower().replace("-", "_")
            prices[ALIASES.get(word, word if word in read_table() else name)] = price
    if problems:
        raise KitError(problems)
    return Question(deadline, budget, tuple(dict.fromkeys(map(int, counts))), prices)


def parse_duration(text: str) -> float | None:
    """Return the seconds of 12h, 90m, 2d or 1h30m; None for what is none, or no time at all."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    units = [unit for _, unit in parts]
    if "".join(number + unit for number, unit in parts) != text or units != [u for u in UNITS if u in units]:
        return None
    return sum(float(number) * UNITS[unit] for number, unit in parts) or None


def read_number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) else None


def list_hosts(
    machine: str | None, question: Question, price: float | None, config_dir: str | None
) -> tuple[list[Host], list[str]]:
    """Return the machines to choose from, each with a number of GPUs and their price, and notes on those left out.

    Those of `hardware=A,B`, else every GPU of the table that has a price, else all of them. A machine with a count has
    that number where --gpus does not say others; one of a user's file never has more.
    """
    kinds = [parse_host(name, config_dir) for name in (machine.split(",") if machine else read_table())]
    keys = {row["name"]: key for key, row in read_table().items()}
    known = {*read_table(), *(kind.entry for kind in kinds)} - {""}
    if wrong := [name for name in question.prices if name not in known]:
        close = difflib.get_close_matches(wrong[0], known, 3, 0.5)
        fix = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(read_table())}"
        raise KitError(
            f"--prices {wrong[0]}={question.prices[wrong[0]]:g} names no GPU that is known", "--prices", fix
        )
    hosts, notes = [], []
    for kind in kinds:
        prices = (question.prices.get(kind.entry), question.prices.get(keys.get(kind.gpu, "")), kind.price, price)
        own = next((p for p in prices if p is not None), None)
        if own is None and not machine and question.prices:
            continue
        counts = question.counts or ((kind.count,) if kind.entry or kind.count > 1 else COUNTS)
        if kind.entry and max(counts) > kind.count:
            notes.append(f"{kind.entry} has {kind.count} GPUs: more are not tried there")
            counts = tuple(count for count in counts if count <= kind.count)
        hosts += [replace(kind, count=count, price=own) for count in counts]
    if question.budget is not None and not any(host.price is not None for host in hosts):
        raise KitError(
            "--budget needs the price of a GPU hour", "--budget", "--price 2.5, or --prices h100=2.5,l4=0.7"
        )
    if not hosts:
        raise KitError(notes[0], "--gpus", f"--gpus {max(kind.count for kind in kinds)}")
    return hosts, notes


def render_rent(found: Figures) -> str:
    """Return the answer and a table of all options, each with why it does not do."""
    limits = [f"within {describe_duration(found['deadline'], 1)}"] if found["deadline"] else []
    limits += [f"for at most {found['budget']:,.2f}"] if found["budget"] is not None else []
    lines = [f"asked      {' and '.join(limits) or 'what fits'}, by the slowest and dearest of each range"]
    if found["ranked_by"] != "cost":
        lines.append("ranked     by GPU hours: no price was given (--price, --prices)")
    for name in ("cheapest", "fastest"):
        lines += [f"{name:<11}{line}" if n == 0 else f"{'':11}{line}" for n, line in enumerate(answer(found, name))]
    lines += ["", f"{'':22}{'GPU GB':>15}  {'GPU hours':>18}  "]
    for option in found["options"]:
        name = f"{option['count']} x {option['gpu']}"
        if "refused" in option:
            lines.append(f"{name:22}refused: {option['refused']} ({option['fix']})")
            continue
        memory = f"{gb(option['needed'])} of {gb(option['limit'])}"
        hours = "{:,.1f} to {:,.1f}".format(*option["gpu_hours"])
        verdict = "; ".join(option["reasons"]) or f"meets all: {durations(option['seconds'])}{cost_of(option)}"
        lines.append(f"{name:22}{memory:>15}  {hours:>18}  {option['engine']}; {verdict}")
    return "\n".join([*lines, *(f"notes      {note}" for note in found["notes"])])


def answer(found: Figures, name: str) -> list[str]:
    """Return the lines of the cheapest or fastest option."""
    option = found[name]
    if option is None:
        return ["none meets all of this" if name == "cheapest" else "none fits and is within the budget"]
    if name == "fastest" and option is found["cheapest"]:
        return ["the same"]
    late = f": {'; '.join(option['reasons'])} is too late" if option["reasons"] else ""
    return [
        f"{option['count']} x {option['gpu']}, {durations(option['seconds'])}{cost_of(option)}{late}",
        f"{option['engine']}, {option['batch']}",
        f"kit train {shlex.join(option['overrides'])}",
    ]


def cost_of(option: Figures) -> str:
    return ", cost {:,.2f} to {:,.2f}".format(*option["cost"]) if option["cost"] else ""
