"""`kit plan`: what a run needs and costs on this machine or another one, without weights and without torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kit.config.memory_choice import describe_level, option_of, usable_bytes
from kit.config.packing import TOKENS_PER_BYTE
from kit.errors import DONE, REFUSED, KitError, Problem
from kit.explain.arithmetic import count_parts, explain_arithmetic, render_arithmetic
from kit.explain.plan_page import write_page
from kit.explain.plan_text import fits, render, render_rows
from kit.forecast.calibration import calibrate, find_correction
from kit.forecast.data_advice import advise
from kit.forecast.host_memory import forecast_disk, forecast_host_memory
from kit.forecast.hosts import EXAMPLES, KEY, Host, find_host, parse_host
from kit.forecast.memory import Step, forecast_memory, measure_sizes
from kit.forecast.of_plan import step_of_plan
from kit.forecast.phases import add_phases
from kit.forecast.stages import stage_picture, states_of_run
from kit.forecast.step_time import PETAFLOP_DAY, forecast_time
from kit.inspection.model import inspect_model
from kit.schema.run_plan import RunPlan
from kit.schema.steps import total_steps
from kit.system import hardware
from kit.system.terminal import verb_parser

# What is tried where a run does not fit, the smallest change first.
CHANGES: tuple[tuple[str, ...], ...] = (
    ("trainer.activation_checkpointing=auto", "trainer.per_device_train_batch_size=auto"),
    ("deepspeed=auto",), ("quantization=nf4",), ("peft=lora",), ("peft=lora", "deepspeed=auto"),
    ("peft=lora", "quantization=nf4"),
)  # fmt: skip
KNOWN = "model=llama3_1_8b, qwen3_8b, mistral_7b, gemma2_9b, mixtral_8x7b, gpt2"
SPREAD = 1.05  # of times that were measured: what one run differs from itself
Figures = dict[str, Any]


def plan_verb(argv: list[str]) -> int:
    """Print the forecast of a run; exit code 2 where it does not fit."""
    parser = verb_parser("plan", "Memory, time, disk and cost of a run before anything is loaded; imports no torch.")
    parser.add_argument("overrides", nargs="*", metavar="run.yaml | DATA | key=value")
    parser.add_argument("--config-dir", "-cd", help="a folder with groups and recipes of your own")
    parser.add_argument("--compare", metavar="KEY=A,B,...", help="a line for each value: deepspeed=zero2,zero3")
    parser.add_argument("--price", type=float, metavar="X", help="of a GPU hour: what the run costs")
    parser.add_argument("--explain", action="store_true", help="rules of thumb, corrected, with this run's figures")
    parser.add_argument("--html", metavar="FILE", help="the figures as a page, with --compare side by side")
    parser.add_argument("--deadline", metavar="12h", help="what to rent: the run ends in time")
    parser.add_argument("--budget", metavar="X", help="what to rent: the run costs no more")
    parser.add_argument("--gpus", metavar="1,2,4,8", help="what to rent: how many of a kind are tried")
    parser.add_argument("--prices", metavar="h100=2.5,l4=0.7", help="what to rent: of a GPU hour, by kind")
    parser.add_argument("--json", action="store_true", help="every term with its formula and source")
    parser.add_argument("--calibrate", nargs="+", metavar="RUN", help="learn from what finished runs measured")
    parser.epilog = f"hardware=... plans for another machine: {EXAMPLES}; without it, for this one"
    from kit.config.flags import parse_words

    a = parse_words(parser, argv)
    if a.calibrate:
        rows = [asdict(row) for row in calibrate(a.calibrate)]
        print(json.dumps(rows, indent=1) if a.json else render_measured(rows))
        return DONE
    words = [word for word in a.overrides if not word.startswith(f"{KEY}=")]
    named = [word.partition("=")[2] for word in a.overrides if word.startswith(f"{KEY}=")]
    if len(named) > 1:
        raise KitError(f"{KEY} is given several times", KEY, "one machine at a time")
    if a.price is not None and not a.price >= 0:
        raise KitError(f"--price {a.price:g} is no price", "--price", "of an hour of one GPU, such as 2.5")
    machine = named[0] if named else None
    if a.deadline or a.budget or a.gpus or a.prices:
        from kit.explain.rent import rent  # which needs this module

        return rent(words, machine, a)
    if a.compare:
        if a.explain:
            raise KitError("--explain is of one run, --compare of several", "--explain", "one of the two")
        rows = compare(words, a.compare, machine, a.price, a.config_dir)
        if a.html:
            key, _, values = a.compare.partition("=")
            machine = machine or (values.partition(",")[0] if key == KEY else None)
            write_page(a.html, forecast_with_changes(words, machine, a.price, a.config_dir), rows)
        print(json.dumps(rows, indent=1) if a.json else render_rows(rows))
        return DONE if any(row.get("fits") for row in rows) else REFUSED
    figures = forecast_with_changes(words, machine, a.price, a.config_dir)
    if a.html:
        write_page(a.html, figures)
    if a.explain:
        figures["arithmetic"] = explain_arithmetic(figures)
    print(json.dumps(figures, indent=1) if a.json else render(figures))
    if a.explain and not a.json:
        print(f"\n{render_arithmetic(figures['arithmetic'])}")
    return DONE if fits(figures) else REFUSED


def forecast_with_changes(
    words: Sequence[str], machine: str | None, price: float | None, config_dir: str | None
) -> Figures:
    """Return all figures of a run on a machine, or on this one, with the changes that would make it fit."""
    host = parse_host(machine, config_dir) if machine else host_of_this_machine()
    figures = forecast_run(words, host, price, config_dir)
    return figures if fits(figures) else figures | {"changes": find_changes(words, host, config_dir)}


def host_of_this_machine() -> Host:
    """Return this machine; KitError where it has no GPU that the table knows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = find_host(hardware.list_gpus(), min(memory, hardware.cgroup_memory_limit() or memory) / 1e9)
    if host is None:
        raise KitError("this machine has no GPU that kit plan knows", KEY, f"say which machine is meant: {EXAMPLES}")
    return host


def compose_for(words: Sequence[str], host: Host, config_dir: str | None) -> RunPlan:
    """Return the plan of a run as it would be made on a host."""
    from kit import api

    with hardware.assume_gpus(host.gpus):
        return api.compose(*words, config_dir=config_dir)


def forecast_run(
    words: Sequence[str], host: Host, price: float | None = None, config_dir: str | None = None
) -> Figures:
    """Return all figures of a run on a host: memory of a GPU and a host, time, disk, cost.

    KitError where the run is refused, trains on a CPU, or is of a base whose memory cannot be forecast.
    """
    plan = compose_for(words, host, config_dir)
    figures, text = forecast_composed(plan, host, price), inspect_model(plan.model, here=False)[0].text
    return figures | {"advice": advise(plan, text, figures, TOKENS_PER_BYTE)}


def forecast_composed(plan: RunPlan, host: Host, price: float | None = None) -> Figures:
    """Return the figures of a run that was composed for a host; price: in place of the host's own."""
    price = host.price if price is None else price
    if plan.trainer["use_cpu"]:
        raise KitError("trainer.use_cpu=true: kit plan forecasts GPUs", "trainer.use_cpu", "leave it out")
    local = plan.launch.num_gpus if isinstance(plan.launch.num_gpus, int) else 1
    if local > host.count:
        raise KitError(
            f"the run takes {local} GPUs of {host.count}", "launch.num_gpus", f"launch.num_gpus={host.count}"
        )
    text = inspect_model(plan.model, here=False)[0].text
    base, length = measure_sizes(text, plan.peft), plan.trainer.get("max_length")
    if base is None or not isinstance(length, int) or plan.fsdp:
        raise KitError([why_not_forecast(plan, text)])
    step = step_of_plan(plan, plan.trainer)
    memory = add_phases(forecast_memory(step, base), step, base)
    needed, usable = memory.peak + memory.outside_allocator, host.memory_gib * 2**30
    limit = usable_bytes(usable, on_cpu=False)
    steps = known_steps(plan)
    accumulation = plan.trainer["gradient_accumulation_steps"]
    packed, documents = bool(plan.trainer.get("packing")), plan.documents
    time = forecast_time(step, base, host, accumulation, int(documents.mean) if packed and documents else length)
    memory_of_host = forecast_host_memory(step, base, local)
    disk = forecast_disk(step, base, plan.trainer, steps)
    notes = list(plan.notes)
    if plan.world_size > local:
        notes.append("several nodes: the link between them is not in the time")
    figures: Figures = {
        "run": {"model": plan.model.name_or_path, "method": (plan.peft or {}).get("peft_type", "full fine-tuning"),
                "engine": describe_engine(plan, step), "processes": plan.world_size, "precision": plan.precision,
                "parameters": base.total, "trained": base.trained, "memory": describe_memory(plan),
                "notes": notes},
        "host": {"name": host.describe(), **asdict(host)},
        "memory": {"needed": needed, "allocated": memory.peak, "outside_allocator": memory.outside_allocator,
                   "usable": usable, "limit": limit, "fits": needed <= limit, "exact": memory.exact,
                   "peaks": memory.peaks, "terms": [asdict(term) for term in memory.terms]},
        "host_memory": {"needed": sum(t.bytes for t in memory_of_host), "terms": [asdict(t) for t in memory_of_host],
                        "available": host.memory_gb and host.memory_gb * 1e9},
        "disk": {"needed": sum(t.bytes for t in disk), "terms": [asdict(t) for t in disk]},
        "documents": documents and documents.model_dump(),
        "step": {**asdict(time), "tokens_all": time.tokens * plan.world_size, "mfu": time.utilization(host)},
        "stages": [asdict(stage) for stage in (states_of_run(step, base), *stage_picture(step, base))],
        "counts": count_parts(step, base),
    }  # fmt: skip
    if learned := find_correction(plan, str(text.get("model_type")), host):
        figures["calibrated"] = learned
        if learned["allocated"]:
            more = memory.peak * learned["allocated"] + learned["outside"]
            held = more <= usable_bytes(usable, on_cpu=False)
            figures["memory"] |= {"forecast": needed, "needed": more, "fits": held}
        if learned["seconds"]:
            least, most = (time.fastest * share for share in learned["seconds"])
            time = replace(time, fastest=least, slowest=max(most, least * SPREAD))
            figures["step"] |= {"fastest": time.fastest, "slowest": time.slowest, "mfu": time.utilization(host)}
    if steps:
        seconds = (steps * time.fastest, steps * time.slowest)
        hours = [s / 3600 * plan.world_size for s in seconds]
        figures["total"] = {
            "steps": steps, "seconds": seconds, "gpu_hours": hours, "tokens": steps * time.tokens * plan.world_size,
            "petaflop_days": steps * time.model_flops * plan.world_size / PETAFLOP_DAY,
            "cost": price is not None and [h * price for h in hours] or None,
        }  # fmt: skip
    return figures


def render_measured(rows: Sequence[Figures]) -> str:
    """Return a line for each run that was measured."""
    lines = [f"{'run':<10} {'GPU':<10} {'architecture, method':<36} {'memory':>8} {'time':>6}   of the forecast"]
    for row in rows:
        seconds = f"{row['seconds']:.2f}" if row["seconds"] else "-"
        kind = f"{row['architecture']}, {row['method']}"
        lines.append(f"{row['run'][:8]:<10} {row['gpu']:<10} {kind:<36} {row['allocated']:>8.3f} {seconds:>6}")
    return "\n".join(lines)


def why_not_forecast(plan: RunPlan, text: Figures) -> Problem:
    """Say what stands against a forecast of a run, and what can be done."""
    name, kind = plan.model.name_or_path, (plan.peft or {}).get("peft_type", "full fine-tuning")
    if plan.fsdp:
        return Problem("the memory of FSDP is not forecast", "fsdp", "fsdp=none, and deepspeed=zero3 in its place")
    if not isinstance(plan.trainer.get("max_length"), int):
        fix = "trainer.max_length=N, the longest row"
        return Problem("without trainer.max_length a step has no size", "trainer.max_length", fix)
    if not text:
        fix = f"kit fetch model.name_or_path={name}, or add a preset of its shape: model=llama3_1_8b"
        return Problem(f"the config.json of {name} is not on this machine", "model.name_or_path", fix)
    if measure_sizes(text, None) is None:
        fix = f"another of its size: {KNOWN}"
        return Problem(f"the modules of {text.get('model_type')} are not in the table", "model.name_or_path", fix)
    fix = "peft=lora, for an estimate: most methods keep less"
    return Problem(f"the memory of {kind} is not forecast", "peft.peft_type", fix)


def known_steps(plan: RunPlan) -> int | None:
    """Return the optimizer steps of a run, where max_steps or the rows of an epoch are known, or can be estimated."""
    rows, documents = plan.rows, plan.documents
    if rows is None and documents is not None and not plan.dataset.streaming:
        packed, length = plan.trainer.get("packing"), plan.trainer["max_length"]
        rows = round(documents.packed_rows(length) if packed else documents.count)
    if plan.trainer.get("max_steps", -1) > 0 or rows:
        return total_steps(rows or 0, plan.trainer, plan.world_size)
    return None


def describe_engine(plan: RunPlan, step: Step) -> str:
    if not plan.deepspeed:
        return "no DeepSpeed" if plan.world_size == 1 else "DDP"
    away = [what for what in ("optimizer", "param") if step.offloads(what)]
    return f"ZeRO-{plan.zero_stage}" + (f", {' and '.join(away)} offloaded" if away else "")


def describe_memory(plan: RunPlan) -> str:
    """Say how the memory is used: what is computed again, rows and accumulation."""
    trainer, option = plan.trainer, option_of(plan)
    rows, steps = option.per_device_train_batch_size, option.gradient_accumulation_steps
    counted = f"{rows} x {trainer['max_length']:,} tokens, {steps} accumulation step{'s' * (steps != 1)}"
    return f"{counted}, {describe_level(option)}"


def find_changes(words: Sequence[str], host: Host, config_dir: str | None) -> list[Figures]:
    """Return changes with which a run fits, the smallest first, each as overrides to add and what it then needs."""
    found = []
    for change in CHANGES:
        keys = {word.partition("=")[0] for word in change}
        kept = [word for word in words if word.partition("=")[0] not in keys]
        with contextlib.suppress(KitError):  # a rule is against it
            figures = forecast_run([*kept, *change], host, config_dir=config_dir)
            if fits(figures):
                step = figures["step"]
                needed = figures["memory"]["needed"]
                found.append({"overrides": change, "needed": needed, "seconds": (step["fastest"], step["slowest"])})
    return found


def compare(
    words: Sequence[str], asked: str, machine: str | None, price: float | None, config_dir: str | None
) -> list[Figures]:
    """Return the figures of a run with each value of a key, `hardware` among them; of a refused one, why."""
    key, _, values = asked.partition("=")
    if not key or len(values.split(",")) < 2:
        raise KitError(f"--compare {asked} names no values", "--compare", "--compare deepspeed=zero2,zero3")
    kept, rows = [word for word in words if word.partition("=")[0] != key], []
    for value in values.split(","):
        row: Figures = {"value": f"{key}={value}"}
        try:
            word = value if key == KEY else machine
            host = parse_host(word, config_dir) if word else host_of_this_machine()
            figures = forecast_run(kept if key == KEY else [*kept, f"{key}={value}"], host, price, config_dir)
        except KitError as error:
            rows.append(row | {"refused": error.problems[0].problem})
            continue
        run, step = figures["run"], figures["step"]
        row |= {name: figures["memory"][name] for name in ("needed", "usable")}
        row |= {"engine": run["engine"], "batch": run["memory"], "seconds": (step["fastest"], step["slowest"])}
        row |= {"host": figures["host_memory"]["needed"], "fits": fits(figures)}
        rows.append(row | ({"total": figures["total"]} if "total" in figures else {}))
    return rows
