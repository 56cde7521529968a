"""A rank ends with whoever started it, and when a file in the run directory says so: each as after a signal."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from kit.errors import FAILED
from kit.launchers import ssh
from kit.training import signals

SAVE_SECONDS = 120.0  # how long ranks whose launcher has died may take to save


def watch_launcher() -> None:
    """Treat a dead launcher as a stop signal: ending the `deepspeed` command leaves its ranks running."""
    me = psutil.Process()
    parent = me.parent()
    if parent is None or "RANK" not in os.environ:
        return
    try:
        family = [parent]
        if any("deepspeed.launcher.launch" in part for part in parent.cmdline()) and (runner := parent.parent()):
            family.append(runner)  # or, on a node that was reached with ssh, its shell, which outlives the connection
            sessions = [p for p in runner.parents() if p.name().startswith("sshd")]
            family += sessions[:1] if "SSH_CONNECTION" in os.environ else []
    except psutil.Error:
        return

    def watch() -> None:
        while all_alive(family):
            time.sleep(1)
        signals.request_stop()
        time.sleep(SAVE_SECONDS)
        os._exit(FAILED)

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


def watch_stop_file(run: Path) -> None:
    """Ranks that were reached with ssh are asked to stop by a file: nobody there can be signalled (ssh.py)."""

    def watch() -> None:
        last_word = ssh.stop_request(run) if ssh.is_stale_stop_request(run) else ""
        while True:
            if (word := ssh.stop_request(run)) != last_word:
                last_word = word
                if word == "now":
                    os._exit(FAILED)
                if word:
                    signals.request_stop()
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="watch-stop").start()


def all_alive(family: list[Any]) -> bool:
    try:
        return all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    except psutil.AccessDenied:  # another person's processes may be hidden
        return True
    except psutil.Error:
        return False
