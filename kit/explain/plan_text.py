"""The figures of `kit plan` as text: a page of a run, a table of several."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from kit.config.packing import about
from kit.forecast.memory import PHASES
from kit.system.terminal import describe_duration

Figures = dict[str, Any]
WIDTH, INDENT = 80, 11  # of the page; of what stands under a heading
BAR, STATE_BAR, TERM_BAR = 44, 30, 30  # characters of the largest phase, model states, term of a host
SYMBOLS = "#=+*o%x~"  # of the largest terms; the others share a dot
# When a term stands in memory, in the order in which its part of a bar comes.
WHEN = {
    "loaded": "from loading on", "always": "in all steps", "load": "loading", "forward": "forward to backward",
    "loss": "head and loss", "backward": "backward", "step": "optimizer step", "evaluate": "evaluation",
    "save": "save",
}  # fmt: skip
OUTSIDE = "outside torch's allocator"


def render_rows(rows: Sequence[Figures]) -> str:
    """Return a table of what `compare` found."""
    width = max(len(row["value"]) for row in rows)
    lines = [f"{'':{width}}  {'GPU GB':>14}  {'host GB':>8}  {'s a step':>16}  "]
    for row in rows:
        if "refused" in row:
            lines.append(f"{row['value']:{width}}  refused: {row['refused']}")
            continue
        verdict = "" if row["fits"] else "does not fit; "
        total = row.get("total")
        time = (
            f"; {describe_duration(total['seconds'][0], 1)} to {describe_duration(total['seconds'][1], 1)}"
            if total
            else ""
        )
        cost = f", {total['cost'][0]:,.2f} to {total['cost'][1]:,.2f}" if total and total["cost"] else ""
        memory = f"{gb(row['needed'])} of {gb(row['usable'])}"
        lines.append(
            f"{row['value']:{width}}  {memory:>14}  {gb(row['host']):>8}  {seconds(*row['seconds']):>16}  "
            f"{verdict}{row['engine']}, {row['batch']}{time}{cost}"
        )
    return "\n".join(lines)


def fits(figures: Figures) -> bool:
    """Return whether a run fits its GPUs and its host."""
    return figures["memory"]["fits"] and host_memory_fits(figures)


def host_memory_fits(figures: Figures) -> bool:
    available = figures["host_memory"]["available"]
    return available is None or figures["host_memory"]["needed"] <= available


def render(figures: Figures) -> str:
    """Return the figures as a page of text."""
    run, memory, step, host = figures["run"], figures["memory"], figures["step"], figures["host_memory"]
    processes = f"{run['processes']} process{'es' * (run['processes'] != 1)}"
    lines = [
        f"run        {run['model']}, {run['method']}, {run['trained']:,} of {run['parameters']:,} parameters trained",
        f"machine    {figures['host']['name']}; {processes}, {run['engine']}, {run['precision']}",
        f"batch      {run['memory']}",
        "",
        f"GPU memory {gb(memory['needed'])} of {gb(memory['usable'])} GB on each: {describe_room(memory)}"
        f"{'' if memory['exact'] else ' (a term is not measured for this model)'}",
    ]
    lines += phase_bars(memory)
    if run["processes"] > 1:
        lines += ["", *render_stages(figures)]
    limit = f" of {gb(host['available'])}" if host["available"] else ""
    lines += ["", f"host       {gb(host['needed'])}{limit} GB{'' if host_memory_fits(figures) else ': does not fit'}"]
    lines += bars(host["terms"])
    lines += ["", f"disk       {gb(figures['disk']['needed'])} GB"]
    lines += [f"           {term['name']}: {term['formula']}" for term in figures["disk"]["terms"]]
    low, high = step["mfu"]
    lines += [
        "",
        f"step       {seconds(step['fastest'], step['slowest'])} s, at most {step['tokens_all']:,} tokens in all, "
        f"{step['model_flops'] / 1e12:,.0f} TFLOP on each GPU, MFU {100 * low:.0f} to {100 * high:.0f} %",
    ]
    if total := figures.get("total"):
        lines.append(
            f"time       {durations(total['seconds'])} for {total['steps']:,} steps, at most "
            f"{total['tokens']:,} tokens, {total['petaflop_days']:.3g} PetaFLOP/s-days"
        )
        if total["cost"]:
            hours = f"{total['gpu_hours'][0]:.2f} to {total['gpu_hours'][1]:.2f} GPU hours"
            lines.append(f"cost       {total['cost'][0]:,.2f} to {total['cost'][1]:,.2f} ({hours})")
    else:
        lines.append("time       the rows of an epoch are not known here; trainer.max_steps=N gives a total")
    if documents := figures["documents"]:
        count, mean = about(documents["count"]), about(documents["mean"])
        epoch = about(documents["count"] * documents["mean"])
        lines.append(f"data       about {count} documents of {mean} tokens, {epoch} in an epoch, by its first rows")
    lines += [f"notes      {note}" for note in run["notes"]]
    if "changes" in figures:
        lines += ["", "what would fit:" if figures["changes"] else "nothing that was tried fits"]
        for change in figures["changes"]:
            needs = f"{gb(change['needed'])} GB, {seconds(*change['seconds'])} s a step"
            lines.append(f"  {' '.join(change['overrides'])}   ({needs})")
    lines += [f"advice     {line}" for line in figures.get("advice", ())]
    return "\n".join(lines)


def describe_room(memory: Figures) -> str:
    """Say whether a run fits its GPUs, and by how much."""
    limit, room = f"the {gb(memory['limit'])} GB limit", memory["limit"] - memory["needed"]
    return f"fits, {gb(room)} GB under {limit}" if memory["fits"] else f"does not fit, {gb(-room)} GB over {limit}"


def stack_terms(memory: Figures) -> dict[str, list[Figures]]:
    """Return the terms that stand in memory at each phase's peak, those that stay longest first."""
    terms = sorted(memory["terms"], key=lambda t: (list(WHEN).index(t["phase"]), -t["bytes"]))
    outside = {"name": OUTSIDE, "bytes": memory["outside_allocator"], "phase": "loaded"}
    return {phase: [term for term in [outside, *terms] if term["phase"] in PHASES[phase]] for phase in memory["peaks"]}


def largest_names(memory: Figures, count: int) -> list[str]:
    """Return the names of the largest terms of all phases, the largest first."""
    sizes: dict[str, float] = {}
    for term in (term for terms in stack_terms(memory).values() for term in terms):
        sizes[term["name"]] = max(term["bytes"], sizes.get(term["name"], 0))
    return sorted(sizes, key=lambda name: -sizes[name])[:count]


def phase_bars(memory: Figures) -> list[str]:
    """Return a bar for each phase, stacked of its terms, against the card; and which sign is which term."""
    symbols = dict(zip(largest_names(memory, len(SYMBOLS)), SYMBOLS, strict=False))
    stacks = stack_terms(memory)
    totals = {phase: sum(term["bytes"] for term in terms) for phase, terms in stacks.items()}
    scale = BAR / max(memory["usable"], *totals.values())
    card = round(scale * memory["usable"])
    share = 100 * memory["limit"] / memory["usable"]
    lines = [f"           each phase's peak; the bracket is the card, the limit {share:.0f} % of it:"]
    if "forecast" in memory:
        lines.insert(0, f"           measured runs say so; by the terms below {gb(memory['forecast'])} GB")
    for phase, terms in stacks.items():
        bar = draw([(symbols.get(term["name"], "."), term["bytes"]) for term in terms], scale)
        inside = f"[{bar[:card]:<{card}}]{bar[card:]}"
        lines.append(f"           {phase:<9}{inside:<{BAR + 2}}{gb(totals[phase]):>7} GB")
    named = {(term["name"], term["phase"]): term for terms in stacks.values() for term in terms}
    for term in sorted(named.values(), key=lambda t: -t["bytes"]):
        if term["bytes"] >= 5e6:
            sign, when = symbols.get(term["name"], "."), WHEN[term["phase"]]
            lines.append(f"         {sign} {term['name']:<28}{gb(term['bytes']):>8} GB  {when}")
    return lines


def draw(parts: Sequence[tuple[str, float]], scale: float) -> str:
    """Return a stacked bar of (sign, size): each part ends where all up to it do, so that the whole is not off."""
    bar, total = "", 0.0
    for sign, size in parts:
        total += size
        bar += sign * (round(scale * total) - len(bar))
    return bar


def render_stages(figures: Figures) -> list[str]:
    """Return the model states of a GPU by stage as lines."""
    stages = figures["stages"]
    scale = STATE_BAR / max(stage["bytes"] for stage in stages)
    lines = ["stages     # weights, = gradients, + optimizer of each GPU; stages: no offload"]
    for stage in stages:
        parts = [("#", sum_parts(stage, "base weights", "adapter")), ("=", sum_parts(stage, "gradients")),
                 ("+", sum_parts(stage, "optimizer"))]  # fmt: skip
        slower = f"  1/{figures['run']['processes']} speed" if stage["speed"] < 1 else ""
        bar = draw(parts, scale)
        lines.append(f"           {stage['name']:<15}{gb(stage['bytes']):>8} GB  {bar:<{STATE_BAR}}{slower}".rstrip())
    return lines + wrap(describe_stages(figures), " " * INDENT)


def describe_stages(figures: Figures) -> str:
    """Say what each ZeRO stage saves in this run; little where the base is frozen."""
    run, sizes = figures["run"], {stage["name"]: stage["bytes"] for stage in figures["stages"]}
    less = [f"{100 * (1 - sizes[f'ZeRO-{n}'] / sizes['data parallel']):.0f} %" for n in (1, 2, 3)]
    split = "a layer split keeps all GPUs but one waiting"
    if figures["counts"]["frozen_base"]:
        return (
            f"ZeRO-1 and 2 part what is trained alone, {100 * run['trained'] / run['parameters']:.2g} % of the "
            f"parameters: {less[0]} and {less[1]} less than data parallel, for the frozen base stays whole on each "
            f"GPU. ZeRO-3 parts it too: {less[2]} less; {split}"
        )
    return (
        f"ZeRO-1 parts the optimizer ({less[0]} less than data parallel), ZeRO-2 the gradients too ({less[1]}), "
        f"ZeRO-3 the weights too ({less[2]}), for at least half as much traffic again; {split}"
    )


def wrap(text: str, first: str) -> list[str]:
    """Return a text as lines of 80 columns, `first` before it; a number and its unit stay together."""
    joined = re.sub(r"(?<=\d) (?=[%A-Z])", "\xa0", text)
    lines = textwrap.wrap(joined, WIDTH, initial_indent=first, subsequent_indent=" " * INDENT)
    return [line.replace("\xa0", " ") for line in lines]


def sum_parts(stage: Figures, *names: str) -> float:
    """Return the bytes of a stage's parts with these names."""
    return sum(size for name, size in stage["parts"].items() if name in names)


def sum_of(terms: Sequence[Figures], *names: str) -> float:
    """Return the bytes of the terms with these names."""
    return sum(term["bytes"] for term in terms if term["name"] in names)


def bars(terms: Sequence[Figures]) -> list[str]:
    """Return a line for each term, the largest first, with a bar as long as its share."""
    ordered = sorted((t for t in terms if t["bytes"] >= 5e6), key=lambda t: -t["bytes"])
    largest = max((t["bytes"] for t in ordered), default=1)
    lines = []
    for term in ordered:
        bar = "#" * max(1, round(TERM_BAR * term["bytes"] / largest))
        lines.append(f"           {term['name']:<28}{gb(term['bytes']):>8} GB  {bar}")
    return lines


def seconds(fastest: float, slowest: float) -> str:
    return f"{fastest:.2f} to {slowest:.2f}"


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2f}"


def durations(both: Sequence[float]) -> str:
    return " to ".join(describe_duration(one, 1) for one in both)
