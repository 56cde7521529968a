"""Several ejected scripts in one process, to spare the imports: `ejected.py FOLDER ...`, each run in its folder."""

from __future__ import annotations

import os
import runpy
import sys


def main(folders: list[str]) -> None:
    from accelerate.state import AcceleratorState, GradientState

    for folder in folders:
        os.chdir(folder)
        runpy.run_path("train.py", run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
