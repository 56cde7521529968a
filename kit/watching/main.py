"""`kit watch RUN`: what is typed, and how it goes on looking: drawn anew, a line per interval, or once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kit.errors import DONE, KitError
from kit.storage import run_directory
from kit.watching import state, view
from kit.watching.metrics import MetricsFollower


def watch_verb(argv: list[str]) -> int:
    """0 while the run is alive, when it is done, and when the person leaves; 75 stopped; a failed run's own code."""
    parser = argparse.ArgumentParser(
        prog="kit watch", allow_abbrev=False,
        description="A run while it trains, or a sweep with a line per trial. It only reads; q or Ctrl-C leaves.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="a run or sweep directory, or the name of one below runs/")
    parser.add_argument("--once", action="store_true", help="one frame, then leave")
    parser.add_argument("--json", action="store_true", help="the present state as JSON, then leave")
    parser.add_argument("--interval", type=float, metavar="SECONDS", help="2 on a terminal, else 30")
    parser.add_argument("--stay", action="store_true", help="go on after its end: a batch job may start it again")
    a = parser.parse_args(argv)
    if a.interval is not None and not 0.1 <= a.interval <= 86400:
        problem = f"--interval {a.interval:g} is not between 0.1 and 86400 seconds"
        raise KitError(problem, "command line", "--interval 2")
    look = RunReader(*state.find_run_or_sweep(a.run))
    states = look()
    if a.json:
        print(json.dumps({"sweep": look.name, "trials": states} if look.sweep else states[0], indent=1))
    elif a.once:
        print(view.render_text(look.frame(states, terminal=False)), end="")
    else:
        drawn = sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb")
        try:
            last = (draw_live if drawn else print_lines)(look, states, a.interval or (2 if drawn else 30), a.stay)
        except KeyboardInterrupt:
            last = None
        return state.watch_exit_code(last) if last else DONE
    return state.watch_exit_code(states)


class RunReader:
    """The present states of a run, or of all trials of a sweep; each metrics.jsonl is read once."""

    def __init__(self, folder: Path, sweep: bool) -> None:
        self.folder, self.sweep, self.name = folder, sweep, run_directory.path_from_here(folder)
        self.followers: dict[Path, MetricsFollower] = {}

    def __call__(self) -> list[dict[str, Any]]:
        if not self.sweep:
            return [self.one(self.folder)]
        if not self.folder.is_dir():
            raise KitError(f"{self.name} is gone", fix="it was moved or deleted while it was watched")
        states = []
        for run in state.trial_folders(self.folder):
            with contextlib.suppress(KitError):  # a trial that has just been removed
                states.append(self.one(run))
        return state.sweep_states(self.folder, states)

    def one(self, run: Path) -> dict[str, Any]:
        follower = self.followers.setdefault(run, MetricsFollower(run / run_directory.METRICS_LOG))
        return state.read_run_state(run, follower)

    def frame(self, states: list[dict[str, Any]], terminal: bool) -> Any:
        return view.sweep_table(self.name, states) if self.sweep else view.run_frame(states[0], hint=terminal)

    def ended(self, states: list[dict[str, Any]]) -> bool:
        """Whether nothing more will come; a sweep that is still held may be about to start the next trial."""
        return state.all_ended(states) and not (self.sweep and state.living_lock_holder(self.folder))

    def line(self, states: list[dict[str, Any]]) -> str:
        if not self.sweep:
            return view.run_line(states[0])
        running = [s for s in states if s["state"] == "running"]
        words = [
            f"{view.escape_control(s['name'])} {view.format_steps(s)} loss {view.format_number(s['loss'])}"
            for s in running
        ]
        return "; ".join([view.count_states(states), *words])


def print_lines(look: RunReader, states: list[dict[str, Any]], interval: float, stay: bool) -> list[dict[str, Any]]:
    """A line per interval, for logs, pipes and terminals that cannot be drawn on."""
    while True:
        print(f"{time.strftime('%H:%M:%S')}  {view.encode_for_stdout(look.line(states))}", flush=True)
        if look.ended(states) and not stay:
            for problem in {p for s in states for p in s.get("problems", [])} if look.sweep else states[0]["problems"]:
                print(view.encode_for_stdout(view.escape_control(problem)), flush=True)
            return states
        time.sleep(interval)
        states = look()


def draw_live(
    look: RunReader, states: list[dict[str, Any]], interval: float, stay: bool
) -> list[dict[str, Any]] | None:
    """A frame that is drawn again at each interval; None when the person leaves with q."""
    from rich.live import Live

    with read_keys() as pressed, Live(console=make_console(sys.stdout), auto_refresh=False) as screen:
        while True:
            screen.update(look.frame(states, terminal=True), refresh=True)
            if look.ended(states) and not stay:
                return states
            if pressed(interval) in ("q", "Q"):
                return None
            states = look()


@contextlib.contextmanager
def read_keys() -> Iterator[Callable[[float], str]]:
    """Wait for a key without Enter, at most so many seconds; "" for none. Only a wait where stdin is no terminal."""
    try:
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin.fileno())
        # A job in the background may not touch the terminal: it would be stopped.
        ours = os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (ImportError, OSError, ValueError, AttributeError, termios.error):
        ours = False
    if not ours:
        yield wait_without_keys
        return

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        if not ready:
            return ""
        return os.read(sys.stdin.fileno(), 1).decode("latin-1") or "q"  # nothing to read: the terminal is gone

    tty.setcbreak(sys.stdin.fileno())
    try:
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)


def wait_without_keys(seconds: float) -> str:
    time.sleep(seconds)
    return ""


def make_console(file: Any, width: int | None = None) -> Any:
    from rich.console import Console

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return Console(file=file, width=width, no_color=not colour, highlight=False, legacy_windows=False, emoji=False)
