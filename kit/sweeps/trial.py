"""One trial of a sweep, in a process of its own: `python -m kit.sweeps.trial PLAN PARENT`.

All that it is given is the path of a frozen plan. It goes on from the newest complete checkpoint, and it stops, with a
checkpoint, when the sweep that started it is gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kit.errors import REFUSED, KitError
from kit.launchers.supervise import launch, newest_checkpoint_name, stop_with_parent
from kit.schema.run_plan import load_plan
from kit.storage import run_directory
from kit.system.terminal import print_problems


def main(argv: list[str]) -> int:
    """The exit code of the trial; what is wrong also goes into its status.json."""
    path, parent = Path(argv[0]), int(argv[1])
    stop_with_parent(parent)
    run = path.parent
    try:
        plan = load_plan(path).model_copy(update={"run_dir": str(run)})
        return launch(plan, resume=newest_checkpoint_name(run))
    except KitError as error:
        print_problems(error.problems, refused=error.code == REFUSED)
        run_directory.set_status_refused(run, error)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
