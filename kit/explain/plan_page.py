"""`kit plan --html FILE`: the figures of a run as one page for a browser or paper, without network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from kit.errors import KitError
from kit.explain.arithmetic import explain_arithmetic
from kit.explain.plan_text import (
    OUTSIDE,
    WHEN,
    Figures,
    describe_room,
    describe_stages,
    durations,
    fits,
    gb,
    host_memory_fits,
    largest_names,
    seconds,
    stack_terms,
)
from kit.storage.json_files import atomic_write_text

PAGE = Path(__file__).with_name("plan_page.html")
COLORS = 8  # of the largest terms, c0 to c7 of the page's style; the others share one
STATE_COLORS = {"base weights": "c0", "adapter": "c0", "gradients": "c1", "optimizer": "c2"}


def write_page(file: str, figures: Figures, rows: Sequence[Figures] = ()) -> None:
    """Write the page of a run, with the rows of `--compare`; KitError where the file cannot be written."""
    try:
        atomic_write_text(Path(file), render_page(figures | ({"compare": list(rows)} if rows else {})))
    except OSError as error:
        raise KitError(f"{file} cannot be written: {error}", "--html", "a file in a folder that is there") from None


def render_page(figures: Figures) -> str:
    """Return the page; every figure on it names its place in the JSON that it holds too (`data-figure`)."""
    sections = (_verdict, _cards, _phases, _stages, _changes, _comparison, _terms, _arithmetic, _notes)
    run = figures["run"]
    head = f"<h1>{escape(run['model'])}</h1>\n<p class=faint>{escape(run['method'])}, by kit plan</p>"
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{run['model']}: kit plan"),
        body="\n".join([head, *filter(None, (section(figures) for section in sections))]),
        figures=json.dumps(figures).replace("<", "\\u003c"),  # no name can end the element
    )


def _show(figures: Figures, path: str, form: Callable[[Any], str]) -> str:
    """Return a figure by its dotted path, as text in an element that names the path."""
    return f'<span data-figure="{escape(path)}">{escape(form(_value(figures, path)))}</span>'


def _value(figures: Figures, path: str) -> Any:
    value: Any = figures
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list | tuple) else value[key]
    return value


def _section(title: str, *parts: str, kind: str = "") -> str:
    return f'<section class="{kind}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], sortable: bool = False) -> str:
    """Return a table; a cell is its attributes and its content, both escaped already."""
    mark = " data-sortable" * sortable
    lines = [
        "<table>",
        "<thead><tr>" + "".join(f"<th{mark}>{escape(h)}</th>" for h in heads) + "</tr></thead>",
        "<tbody>",
    ]
    for row in rows:
        cells = (f'<td data-label="{escape(h)}" {a}>{text}</td>' for h, (a, text) in zip(heads, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>"])


def _verdict(f: Figures) -> str:
    memory, word = f["memory"], "Fits" if fits(f) else "Does not fit"
    lines = [f"<strong>{word}</strong>",
             f"<p>Each GPU needs {_show(f, 'memory.needed', gb)} GB and has {_show(f, 'memory.usable', gb)} GB: "
             f"{escape(describe_room(memory).partition(', ')[2])}.</p>"]  # fmt: skip
    if not host_memory_fits(f):
        lines.append(
            f"<p>The host needs {_show(f, 'host_memory.needed', gb)} GB of its "
            f"{_show(f, 'host_memory.available', gb)} GB: does not fit.</p>"
        )
    if not memory["exact"]:
        lines.append("<p>A term of the memory is not measured for this model: an estimate.</p>")
    return f'<div class="verdict {"yes" if fits(f) else "no"}">\n' + "\n".join(lines) + "\n</div>"


def _cards(f: Figures) -> str:
    run, step = f["run"], f["step"]
    low, high = step["mfu"]
    trained = f"{run['trained']:,} of {run['parameters']:,} parameters trained"
    engine = f"{run['processes']} process{'es' * (run['processes'] != 1)}, {run['engine']}, {run['precision']}"
    speed = f"MFU {100 * low:.0f} to {100 * high:.0f} %, at most {step['tokens_all']:,} tokens"
    step_time = f"{_show(f, 'step.fastest', _two)} to {_show(f, 'step.slowest', _two)} s"
    cards = [
        ("machine", escape(f["host"]["name"]), escape(engine)),
        ("batch", escape(run["memory"]), escape(trained)),
        ("optimizer step", step_time, speed),
    ]
    if total := f.get("total"):
        work = f"at most {total['tokens']:,} tokens, {total['petaflop_days']:.3g} PetaFLOP/s-days"
        cards.append(("time", _show(f, "total.seconds", durations), f"{total['steps']:,} steps, {work}"))
        hours = f"{total['gpu_hours'][0]:,.2f} to {total['gpu_hours'][1]:,.2f} GPU hours"
        cost = _show(f, "total.cost", lambda c: f"{c[0]:,.2f} to {c[1]:,.2f}") if total["cost"] else "no price given"
        cards.append(("cost", cost, escape(hours)))
    else:
        cards.append(("time and cost", "not known", "trainer.max_steps=N gives a total"))
    available = f["host_memory"]["available"]
    limit = f" of {_show(f, 'host_memory.available', gb)}" if available else ""
    cards.append(("host memory", f"{_show(f, 'host_memory.needed', gb)}{limit} GB", "of one host"))
    files = "; ".join(f"{t['name']}: {t['formula']}" for t in f["disk"]["terms"])
    cards.append(("disk", f"{_show(f, 'disk.needed', gb)} GB", escape(files)))
    items = (f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>" for name, value, more in cards)
    return _section("The run", f'<dl class="cards">{"".join(items)}</dl>')


def _bar(parts: Sequence[tuple[str, str, float, str]], scale: float, marks: str = "") -> str:
    """Return a stacked bar of (class, title, size, path of the figure)."""
    spans = (
        f'<span class="{kind}" style="width:{100 * size / scale:.3f}%" title="{escape(title)}, {gb(size)} GB" '
        f'data-bar="{path}"></span>' for kind, title, size, path in parts
    )  # fmt: skip
    return f'<div class="bar">{"".join(spans)}{marks}</div>'


def _legend(kinds: Sequence[tuple[str, str]]) -> str:
    items = (f'<li><i class="{kind}"></i>{escape(name)}</li>' for name, kind in kinds)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _phases(f: Figures) -> str:
    memory, stacks = f["memory"], stack_terms(f["memory"])
    names = largest_names(memory, COLORS)
    colors = {name: f"c{number}" for number, name in enumerate(names)}
    places = {id(term): f"memory.terms.{number}.bytes" for number, term in enumerate(memory["terms"])}
    totals = {phase: sum(term["bytes"] for term in terms) for phase, terms in stacks.items()}
    scale = max(memory["usable"], *totals.values())
    marks = (
        f'<i style="left:{100 * memory["usable"] / scale:.3f}%" title="the card"></i>'
        f'<i class="limit" style="left:{100 * memory["limit"] / scale:.3f}%" title="the limit"></i>'
    )
    lines, others = [], [("others", "rest")] if len(largest_names(memory, COLORS + 1)) > COLORS else []
    for phase, terms in stacks.items():
        parts = [
            (colors.get(t["name"], "rest"), t["name"], t["bytes"], places.get(id(t), "memory.outside_allocator"))
            for t in terms
        ]
        lines.append(f'<div class="row"><b>{escape(phase)}</b>{_bar(parts, scale, marks)}'
                     f"<output>{gb(totals[phase])} GB</output></div>")  # fmt: skip
    says = (
        f"The solid line is the {gb(memory['usable'])} GB of a card, the dotted one the {gb(memory['limit'])} GB that "
        "a forecast may fill. What stands from loading on comes first."
    )
    if "forecast" in memory:
        says += f" The bars are of the forecast; runs that were measured give {gb(memory['needed'])} GB."
    return _section("Memory of each GPU, by phase", f"<p class=faint>{says}</p>", *lines,
                    _legend([*colors.items(), *others]))  # fmt: skip


def _stages(f: Figures) -> str:
    title, stages = "Weights, gradients and optimizer of each GPU, by stage", f["stages"]
    if f["run"]["processes"] == 1:
        return _section(title, "<p>One GPU: there is nothing to part.</p>")
    scale, lines = max(stage["bytes"] for stage in stages), []
    for number, stage in enumerate(stages):
        parts = [
            (STATE_COLORS[name], name, size, f"stages.{number}.parts.{name}") for name, size in stage["parts"].items()
        ]
        slower = f" (1/{f['run']['processes']} of the speed)" if stage["speed"] < 1 else ""
        size = _show(f, f"stages.{number}.bytes", gb)
        lines.append(f'<div class="row"><b>{escape(stage["name"] + slower)}</b>{_bar(parts, scale)}'
                     f"<output>{size} GB</output></div>")  # fmt: skip
    legend = _legend([("weights", "c0"), ("gradients", "c1"), ("optimizer", "c2")])
    return _section(title, f"<p class=faint>{escape(describe_stages(f))}.</p>", *lines, legend)


def _changes(f: Figures) -> str:
    if "changes" not in f:
        return ""
    rows = []
    for number, change in enumerate(f["changes"]):
        rows.append([("", f"<code>{escape(' '.join(change['overrides']))}</code>"),
                     _number(f, f"changes.{number}.needed"), ("", escape(seconds(*change["seconds"])))])  # fmt: skip
    found = (
        _table(["add", "GB of each GPU", "seconds a step"], rows) if rows else "<p>Nothing that was tried fits.</p>"
    )
    return _section("What would fit", found)


def _comparison(f: Figures) -> str:
    rows = []
    for number, row in enumerate(f.get("compare", ())):
        value = ("", f"<code>{escape(row['value'])}</code>")
        if "refused" in row:
            rows.append([value, ('class="no"', "refused"), *[("", "")] * 4, ("", escape(row["refused"]))])
            continue
        total = row.get("total") or {}
        cost = total.get("cost")
        rows.append([
            value, ('class="yes"', "fits") if row["fits"] else ('class="no"', "does not fit"),
            _number(f, f"compare.{number}.needed"), ("", escape(seconds(*row["seconds"]))),
            ("", escape(durations(total["seconds"])) if total else ""),
            ("", f"{cost[0]:,.2f} to {cost[1]:,.2f}" if cost else ""),
            ("", escape(f"{row['engine']}, {row['batch']}")),
        ])  # fmt: skip
    heads = ["value", "verdict", "GB of each GPU", "seconds a step", "time", "cost", "how"]
    return _section("Side by side", _table(heads, rows, sortable=True)) if rows else ""


def _terms(f: Figures) -> str:
    """Return the table of all terms: of a GPU, of a host, of the disk."""
    outside = "CUDA's context, and a share of the peak for what lies between the allocator's blocks"
    rows = [[("", escape(OUTSIDE)), _number(f, "memory.outside_allocator"), ("", WHEN["loaded"]),
             ("", escape(outside)), ("", "estimate")]]  # fmt: skip
    for where, path in (("GPU", "memory"), ("host", "host_memory"), ("disk", "disk")):
        for number, term in enumerate(f[path]["terms"]):
            when = WHEN[term["phase"]] if where == "GPU" else where
            rows.append([("", escape(term["name"])), _number(f, f"{path}.terms.{number}.bytes"), ("", escape(when)),
                         ("", escape(term["formula"])), ("", escape(term["source"]))])  # fmt: skip
    heads = ["term", "GB", "when", "formula", "source"]
    return _section("All terms", _table(heads, rows, sortable=True), kind="long")


def _number(figures: Figures, path: str) -> tuple[str, str]:
    """Return a cell with a figure in GB that a table is sorted by."""
    return f'class="number" data-value="{_value(figures, path)}"', _show(figures, path, gb)


def _arithmetic(f: Figures) -> str:
    rows = [
        [("", escape(line[key])) for key in ("topic", "rule", "correction", "here")] for line in explain_arithmetic(f)
    ]
    table = _table(["of", "rule of thumb", "but", "here"], rows)
    title = "<summary>Rules of thumb, and this run</summary>"
    return f'<section class="long"><details>{title}\n{table}\n</details></section>'


def _notes(f: Figures) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in f["run"]["notes"])
    return _section("Notes", f"<ul>{notes}</ul>") if notes else ""


def _two(value: float) -> str:
    return f"{value:.2f}"
