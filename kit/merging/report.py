"""merge.json in words."""

from __future__ import annotations

from typing import Any

from kit.storage import run_directory


def format_merge(report: dict[str, Any]) -> str:
    """merge.json in a few lines."""
    seconds = report["seconds"]
    lines = [f"merged    {run_directory.path_from_here(report['out'])} ({report['method']}, {seconds['all']:.1f} s)"]
    lines += [f"note      {note}" for note in report.get("notes", [])]
    if report.get("onto"):
        gap = report.get("as_trained")
        distance = (
            f"by {gap['mean_difference']:.3g} on average, {gap['max_difference']:.3g} at most, where logits spread by "
            f"{gap['logits_std']:.3g}; the same next token in {gap['argmax_agreement']:.0%}"
            if gap
            else "by what --verify logits would measure"
        )
        lines.append(f"differs   from quantized base + adapter, as trained: {distance}")
    proof = report.get("verification") or {}
    for kind, checks in proof.items():
        figures = [f"{k.replace('_', ' ')} {v:.3g}" for k, v in checks.items() if isinstance(v, int | float)]
        lines.append(f"verified  {kind}: {', '.join(figures)}")
    if not proof:
        lines.append("verified  no: --verify logits compares it with base + adapter")
    return "\n".join(lines)
