"""The verbs that only look: list and show."""

from __future__ import annotations

import sys

from kit.errors import DONE
from kit.system.terminal import options


def list_choices(argv: list[str]) -> int:
    parser = options("list", "Recipes, or the choices of a group, each with its first line.")
    parser.add_argument("group", nargs="?", default="recipe")
    a = parser.parse_args(argv)
    from kit.explain import catalog

    print(catalog.list_group(a.group), end="")
    if a.group == catalog.RECIPE:  # not among the names that a script reads
        print(f"\nkit list GROUP: {', '.join(g for g in catalog.groups() if g != catalog.RECIPE)}", file=sys.stderr)
    return DONE


def show(argv: list[str]) -> int:
    parser = options(
        "show", "A recipe or a choice of a group as it is written; for a recipe also what it composes to."
    )
    parser.add_argument("name", metavar="RECIPE | GROUP/NAME | NAME")
    a = parser.parse_args(argv)
    from kit.explain import catalog

    print(catalog.show(a.name), end="")
    return DONE
