"""What the verbs share of a terminal: quiet libraries, a progress line, problems in words, prompts from a file."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kit.errors import KitError, Problem

LINE_SECONDS = 10  # between lines of progress, where there is no terminal


def print_status(line: str) -> None:
    """A line for the user, on standard error. A terminal that is gone must not cost a run its checkpoint."""
    with contextlib.suppress(OSError):
        print(f"kit: {line}", file=sys.stderr, flush=True)


def describe_duration(seconds: float, digits: int = 0) -> str:
    """Return seconds in the largest unit of which there are two: "3 hours", "42 s"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def verb_parser(verb: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"kit {verb}", description=description, allow_abbrev=False)


def read_prompts(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"{name} cannot be read: {error}", "--prompts", "a text file, one prompt per line") from None
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise KitError(f"{name} holds no prompts", "--prompts", "one prompt per line")
    return prompts


def progress_printer(label: str) -> Callable[[int, int], None] | None:
    """A line that is redrawn on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        print(f"\r{label} {100 * done // max(total, 1):3d} %", end=end, file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def show_progress(label: str, unit: str, total: int | None, count: Callable[[], int]) -> Iterator[None]:
    """While the block runs, say on standard error how much is done: a bar on a terminal, elsewhere a line per 10 s."""
    started, ended = time.monotonic(), threading.Event()
    drawn = sys.stderr.isatty()

    def watch() -> None:
        while not ended.wait(1 if drawn else LINE_SECONDS):
            done = count() if total is None else min(count(), total)
            speed = done / (time.monotonic() - started)
            bar = f"[{'#' * (24 * done // max(1, total)):<24}] " if drawn and total is not None else ""
            of = "" if total is None else f" of {total:,}"
            line = f"{label}: {bar}{done:,}{of} {unit}, {speed:,.0f} {unit}/s"
            print(f"\r{line}\x1b[K" if drawn else line, end="" if drawn else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if drawn and time.monotonic() - started > 1:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def silence_libraries() -> None:
    """The training stack is there; no chatter from it."""
    from kit.system.dependencies import require_training_extras

    require_training_extras()
    for key, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }.items():
        os.environ.setdefault(key, value)
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)  # names to come, which a user of the kit never types


def print_problems(problems: list[Problem], refused: bool) -> None:
    """Problem, where, fix: one block each, on standard error."""
    count = len(problems)
    if refused and count > 1:
        print(f"refused: {count} problems\n", file=sys.stderr)
    for number, problem in enumerate(problems):
        print(
            ("\n" if number else "") + ("refused: " if refused and count == 1 else "") + str(problem), file=sys.stderr
        )
    if any(problem.rule for problem in problems):
        print("\nkit check --explain RULE tells more", file=sys.stderr)
