"""Options of the verbs that take `key=value`: other tools' `--key value` is refused with the override to type."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection

from kit.errors import KitError, Problem


def parse_words(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the words of a verb that takes overrides; KitError with what to type for options that it does not have."""
    actions = parser._option_string_actions  # argparse tells of unknown options only by ending the process
    taking = [flag for flag, action in actions.items() if action.nargs != 0]
    refuse_unknown_flags(argv, actions, parser.prog.rpartition(" ")[2], taking)
    return parser.parse_intermixed_args(argv)


def refuse_unknown_flags(argv: list[str], known: Collection[str], verb: str, taking: Collection[str] = ()) -> None:
    """Refuse options that a verb does not have: a setting is typed key=value, whatever another tool's form is.

    Args:
        argv: the words after the verb.
        known: the verb's own options.
        verb: its name, for the message.
        taking: those of `known` that take the next word.
    """
    if not any(word.startswith("-") for word in argv):
        return
    from kit.foreign.read import is_option  # with the tables of other tools, which most command lines do not need

    problems = []
    place = 0
    while place < len(argv) and argv[place] != "--":
        name, equals, typed = argv[place].partition("=")
        place += 1
        if not is_option(name):
            continue
        if name in known or (not name.startswith("--") and name[:2] in known and len(name) < 7):  # -cjob
            place += name in taking and not equals
            continue
        values = [typed] if equals else []
        while not equals and place < len(argv) and is_value(argv[place]):
            values.append(argv[place])
            place += 1
        typed = f"[{','.join(values)}]" if len(values) > 1 else (values or ["true"])[0]
        fix = suggest(name, typed, known, verb)
        problems.append(Problem(f"kit {verb} has no option {name}", "command line", fix, "override"))
    if problems:
        raise KitError(problems)


def is_value(word: str) -> bool:
    """Tell whether a word may be the value of the option before it."""
    from kit.foreign.read import is_option

    return not is_option(word) and "=" not in word and not word.endswith((".yaml", ".yml"))


def suggest(name: str, typed: str, known: Collection[str], verb: str) -> str:
    """Say what to type for an option that is none."""
    from kit.config.pointers import suggest_words  # the tables of other tools

    long = [k for k in known if k.startswith("--")]
    if cut := [k for k in long if name.startswith("--") and len(name) > 3 and k.startswith(name)]:
        return f"did you mean {cut[0]}?"
    close = difflib.get_close_matches(name, long, 1, 0.8)
    meant = f"did you mean {close[0]}?" if close else suggest_words(name, typed)
    return meant or f"settings are typed key=value; kit {verb} --help lists the options"
