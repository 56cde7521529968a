"""The command line: the table of verbs, and what is typed after each."""

from kit.cli.verbs import main

__all__ = ["main"]
