"""What the rows of gpu.py say together: medians over series, beside TRL and the card's limit; and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import learning

SAME_ROWS = ("full", "zero2", "zero3", "full_zero3", "full_zero3_offload", "learning")  # whose losses can be compared
Rows = Mapping[str, Mapping[str, Any]]


def summarize(rows: Rows) -> dict[str, Any]:
    """Return the figures of each work, base and arm, the learning comparison and the sweeps."""
    runs: dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for key, row in rows.items():
        work, shape, arm, series = key.split()
        runs.setdefault((work, shape), {}).setdefault(arm, {})[int(series)] = row
    speed = {}
    for (work, shape), arms in runs.items():
        if work != "sweep":
            speed[f"{work} {shape}"] = {arm: cell(work, arm, arms) for arm in arms}
    found: dict[str, Any] = {"speed": speed}
    found["learning"] = {shape: seeds(arms) for (work, shape), arms in runs.items() if work == "learning"}
    found["sweep"] = {shape: sweep(arms) for (work, shape), arms in runs.items() if work == "sweep"}
    return found


def cell(work: str, arm: str, arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return one arm's medians over its series, its speed as shares of the limit and of TRL, and how losses differ."""
    good = {n: row for n, row in arms[arm].items() if "useful_tokens_per_second" in row}
    if not good:
        row = next(iter(arms[arm].values()))
        return {"out_of_memory": True} if row.get("out_of_memory") else {"failed": row.get("failed")}
    rates = [row["useful_tokens_per_second"] for row in good.values()]
    found: dict[str, Any] = {"series": len(good), "useful_tokens_per_second": round(statistics.median(rates), 1)}
    found["spread"] = round((max(rates) - min(rates)) / statistics.median(rates), 4)
    for other, name in (("limit", "of_limit"), ("trl", "of_trl")):
        base = [r["useful_tokens_per_second"] for r in arms.get(other, {}).values() if "useful_tokens_per_second" in r]
        if base and arm not in (other, "limit"):
            found[name] = round(found["useful_tokens_per_second"] / statistics.median(base), 4)
    keys = ("median_step_seconds", "peak_gb", "peak_reserved_gb", "forecast_gb", "resident_parameter_gb",
            "first_step_after_seconds")  # fmt: skip
    for key in keys:
        values = [row[key] for row in good.values() if row.get(key) is not None]
        if values:
            found[key] = round(statistics.median(values), 4)
    found |= {key: row[key] for row in good.values() for key in ("chosen", "attention") if key in row}
    if "losses" in next(iter(good.values())):
        found["losses_finite"] = all(math.isfinite(x) for row in good.values() for x in row["losses"])
        peers = arms.get("trl", {})
        pairs = [(row["losses"], peers[n]["losses"]) for n, row in good.items() if "losses" in peers.get(n, {})]
        pairs = [(x, y) for x, y in pairs if len(x) == len(y)]  # of other steps, other learning rates
        if arm != "trl" and work in SAME_ROWS and pairs:
            found["losses_apart"] = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    return found


def seeds(arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Compare the kit's losses with TRL's over the seeds that both finished."""
    kit, trl = ({n: r["losses"] for n, r in arms.get(arm, {}).items() if "losses" in r} for arm in ("kit", "trl"))
    both = sorted(set(kit) & set(trl))
    return learning.compare_seeds({"kit": [kit[n] for n in both], "trl": [trl[n] for n in both]}) if both else None


def sweep(arms: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what "auto" took beside the best of the typed options; options in GiB, measured and foretold."""
    rows = {arm: next(iter(series.values())) for arm, series in arms.items()}
    typed = {arm: r for arm, r in rows.items() if arm != "auto" and "useful_tokens_per_second" in r}
    auto = rows.get("auto", {})
    found: dict[str, Any] = {
        "options": len([arm for arm in rows if arm != "auto"]),
        "out_of_memory": sorted(arm for arm, row in rows.items() if row.get("out_of_memory")),
        "memory": {
            arm: {"forecast_gb": row.get("forecast_gb"), "peak_gb": row["peak_gb"]}
            for arm, row in rows.items()
            if row.get("peak_gb")
        },
    }
    found["auto"] = {k: auto.get(k) for k in ("useful_tokens_per_second", "chosen", "options_that_ran_out_of_memory")}
    if typed:
        best = max(typed, key=lambda arm: typed[arm]["useful_tokens_per_second"])
        found["best"] = {"option": best, "useful_tokens_per_second": typed[best]["useful_tokens_per_second"]}
        if auto.get("useful_tokens_per_second"):
            share = auto["useful_tokens_per_second"] / typed[best]["useful_tokens_per_second"]
            found["auto_of_best"] = round(share, 4)
    known = [m["forecast_gb"] / m["peak_gb"] - 1 for m in found["memory"].values() if m["forecast_gb"]]
    if known:
        found["forecast_error"] = {"least": round(min(known), 4), "most": round(max(known), 4)}
    return found


def table(summary: Mapping[str, Any]) -> str:
    lines = [
        f"{'work':<20}{'base':<16}{'arm':<13}{'useful tok/s':>13}{'+-%':>6}{'limit':>7}{'x TRL':>7}{'peak GB':>9}"
        f"{'forecast':>9}{'to step 1, s':>14}{'losses apart':>14}  chosen"
    ]
    for name, arms in summary["speed"].items():
        work, shape = name.split()
        lines += [f"{work:<20}{shape:<16}{arm:<13}{line(found)}" for arm, found in arms.items()]
    for shape, found in summary["learning"].items():
        if found:
            final, apart = found["final_loss"], found["between_seeds"]
            lines.append(
                f"learning, {shape}: {found['seeds']} seeds, final loss kit {final['kit']} TRL {final['trl']} (from "
                f"{found['first_loss']['kit']}), paired gap {found['paired_gap']}, between seeds {apart['trl']}, "
                f"at most {found['largest_apart']} apart at a step"
            )
    for shape, found in summary["sweep"].items():
        best, error = found.get("best") or {}, found.get("forecast_error")
        lines.append(
            f"sweep, {shape}: {found['options']} options, {len(found['out_of_memory'])} out of memory; best "
            f"{best.get('option')} {best.get('useful_tokens_per_second')} tok/s; auto "
            f"{found['auto']['useful_tokens_per_second']} ({found.get('auto_of_best')} of it, "
            f"{found['auto']['options_that_ran_out_of_memory']} out of memory)"
        )
        if error:
            lines[-1] += f"; forecast {100 * error['least']:+.1f} to {100 * error['most']:+.1f} % of the peak"
    return "\n".join(text.rstrip() for text in lines)


def line(found: Mapping[str, Any]) -> str:
    if "useful_tokens_per_second" not in found:
        return "out of memory" if found.get("out_of_memory") else f"failed with {found['failed']}"

    def number(key: str, form: str) -> str:
        return format(found[key], form) if found.get(key) is not None else "-"

    return (
        f"{found['useful_tokens_per_second']:>13,.0f}{100 * found['spread']:>6.1f}{number('of_limit', '.0%'):>7}"
        f"{number('of_trl', '.2f'):>7}{number('peak_gb', '.1f'):>9}{number('forecast_gb', '.1f'):>9}"
        f"{number('first_step_after_seconds', '.1f'):>14}{number('losses_apart', '.1e'):>14}  "
        f"{choice(found.get('chosen'))}"
    )


def choice(chosen: Mapping[str, Any] | None) -> str:
    """Say a plan's choice in a few words."""
    if not chosen:
        return ""
    kwargs: Sequence[str] = [f"{k}={v}" for k, v in (chosen.get("activation_checkpointing_kwargs") or {}).items()]
    level = " ".join(["checkpointing", *kwargs]) if chosen.get("activation_checkpointing") else "no checkpointing"
    return f"{level}, {chosen['per_device_train_batch_size']} x {chosen['gradient_accumulation_steps']} rows"
