"""`launch.script` of the training benchmarks: the kit's own worker with the same clocks as the peer's script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.worker import main

if __name__ == "__main__":
    from clock import Clock, watched

    import kit.training.model

    kit.training.model.load_model = watched(kit.training.model.load_model)
    main(callbacks=[Clock()])
