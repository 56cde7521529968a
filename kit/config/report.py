"""Collects all that is found about a run while it is read, inspected, resolved and checked by the rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from kit.errors import KitError, Problem


class Report:
    """The problems, warnings and notes of a run; a problem or warning says where its key was set."""

    def __init__(self, provenance: Mapping[str, str]) -> None:
        """`provenance`: dotted key to where it was set, as Composed has it."""
        self.provenance = provenance
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.notes: list[str] = []

    def set_by(self, key: str) -> str:
        """Say where a dotted key was set; a key inside a set value is set where that value is."""
        parts = re.sub(r"\[\d+\]", "", key).split(".")
        for end in range(len(parts), 0, -1):
            name = ".".join(parts[:end])
            if place := self.provenance.get(name):
                return place if place.startswith("command line") else f"{key} in {place}"
            inside = [place for k, place in self.provenance.items() if k.startswith(f"{name}.")]
            if inside and end == len(parts):  # a block that is no value itself: where its first key is
                return inside[0] if inside[0].startswith("command line") else f"{key} in {inside[0]}"
        return key

    def chosen(self, key: str) -> bool:
        """Tell whether a recipe, a file or the command line set a key; what the kit's own groups hold are defaults."""
        group = f"{key.partition('.')[0]}/"
        return not self.provenance.get(key, group).startswith(group)

    def problem(self, key: str, text: str, fix: str, rule: str) -> None:
        self.problems.append(Problem(text, self.set_by(key), fix, rule))

    def warning(self, key: str, text: str, fix: str, rule: str) -> None:
        self.warnings.append(Problem(text, self.set_by(key), fix, rule))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def add(self, problems: Iterable[Problem], key: str = "") -> None:
        """Take over problems whose place is a dotted key, `key` where they name none."""
        self.problems += [Problem(p.problem, self.set_by(p.where or key), p.fix, p.rule) for p in problems]

    def refuse(self) -> None:
        """Raise KitError with all problems, each once; return where there are none."""
        if self.problems:
            raise KitError(unique(self.problems))


def unique(problems: Iterable[Problem]) -> list[Problem]:
    """List the problems without those that say the same of the same place."""
    return list({(p.problem, p.where): p for p in problems}.values())
