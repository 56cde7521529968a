"""The rules told: `kit check --explain RULE`, `kit check --rules`, and the page RULES.md."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kit.config.rules.context import Rule
from kit.config.rules.table import CHECKS, READING, RULES
from kit.errors import KitError

FILE = Path(__file__).with_name("stories.yaml")
PAGE = Path(__file__).with_name("RULES.md")
SEVERITIES = {"refuse": "refuses", "warn": "warns"}


@cache
def stories() -> dict[str, dict[str, str]]:
    """{rule id: {says, story}}: one line, and a few sentences."""
    return yaml.load(FILE.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def find(id: str) -> Rule:
    """The rule of that id; KitError with the nearest ones where there is none."""
    by_id = {rule.id: rule for rule in RULES}
    if id not in by_id:
        near = difflib.get_close_matches(id, by_id, 3, 0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else "kit check --rules lists them"
        raise KitError(f"there is no rule {id!r}", "command line", fix)
    return by_id[id]


def facts(rule: Rule) -> dict[str, str]:
    """What the table knows of a rule, in words."""
    when = "only on the machine where the run starts" if rule.on_this_machine else "always"
    made = f"while reading, in kit/{rule.reported_by}.py" if rule.reported_by else when
    held: dict[str, Any] = {
        "severity": SEVERITIES[rule.severity],
        "looks at": ", ".join(rule.keys) or "any key",
        "checked": made,
        "source": rule.source,
    }
    return held


def explain(id: str) -> str:
    """A rule's story, for a terminal."""
    rule = find(id)
    told = stories()[rule.id]
    lines = [f"{rule.id}: {told['says']}", "", wrapped(told["story"]), ""]
    return "\n".join([*lines, *(f"{name:<9} {value}" for name, value in facts(rule).items())])


def listing() -> str:
    """Every rule on a line: id, severity, what it says."""
    width = max(len(rule.id) for rule in RULES)
    told = stories()
    return "\n".join(
        f"{rule.id:<{width}}  {SEVERITIES[rule.severity]:<7}  {told[rule.id]['says']}"
        for rule in sorted(RULES, key=lambda r: r.id)
    )


def page() -> str:
    """RULES.md: the whole table with its stories."""
    told = stories()
    lines = [
        "# Rules",
        "",
        "Everything that `kit check` refuses or warns of. Made from `rules.py` and `stories.yaml`; after a change of",
        "either: `KIT_UPDATE=1 pytest tests/config/test_rules.py`. T numbers and faults stand in",
        "`tests/config/coverage.yaml`.",
    ]
    for title, rules in (("Between keys", CHECKS), ("While reading", READING)):
        lines += ["", f"## {title}"]
        for rule in rules:
            lines += ["", f"### {rule.id}", "", f"**{told[rule.id]['says']}**", "", told[rule.id]["story"].strip(), ""]
            lines += [f"- {name}: {value}" for name, value in facts(rule).items()]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    import textwrap

    return "\n\n".join(textwrap.fill(part, 100) for part in text.strip().split("\n\n"))
