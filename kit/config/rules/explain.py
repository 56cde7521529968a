"""Explains the rules: `kit check --explain RULE` and `kit check --rules`."""

from __future__ import annotations

import difflib
import textwrap
from functools import cache
from pathlib import Path

import yaml

from kit.config.rules.context import Rule
from kit.config.rules.table import RULES
from kit.errors import KitError

FILE = Path(__file__).with_name("explanations.yaml")
SEVERITIES = {"refuse": "refuses", "warn": "warns"}


@cache
def explanations() -> dict[str, dict[str, str]]:
    """Read {rule id: {summary, explanation}}: one line, and a few sentences."""
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def find_rule(id: str) -> Rule:
    """Return the rule of that id; KitError with the nearest ones where there is none."""
    by_id = {rule.id: rule for rule in RULES}
    if id not in by_id:
        close = difflib.get_close_matches(id, by_id, 3, 0.5)
        fix = f"did you mean {' or '.join(close)}?" if close else "kit check --rules lists them"
        raise KitError(f"there is no rule {id!r}", "command line", fix)
    return by_id[id]


def explain_rule(id: str) -> str:
    """Explain a rule for a terminal: what the libraries do by themselves, why it hurts, and what to do."""
    rule = find_rule(id)
    words = explanations()[rule.id]
    if rule.reported_by:
        checked = f"while reading, in kit/{rule.reported_by}.py"
    else:
        checked = "only on the machine where the run starts" if rule.on_this_machine else "always"
    facts = {
        "severity": SEVERITIES[rule.severity],
        "looks at": ", ".join(rule.keys) or "any key",
        "checked": checked,
        "source": rule.source,
    }
    paragraphs = [textwrap.fill(part, 100) for part in words["explanation"].strip().split("\n\n")]
    lines = [f"{rule.id}: {words['summary']}", "", "\n\n".join(paragraphs), ""]
    return "\n".join([*lines, *(f"{name:<9} {value}" for name, value in facts.items())])


def list_rules() -> str:
    """List every rule on a line: id, severity, summary."""
    width = max(len(rule.id) for rule in RULES)
    return "\n".join(
        f"{rule.id:<{width}}  {SEVERITIES[rule.severity]:<7}  {explanations()[rule.id]['summary']}"
        for rule in sorted(RULES, key=lambda rule: rule.id)
    )
