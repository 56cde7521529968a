"""`launch.script` of the training benchmarks: the kit's own worker with the same clocks as the peer's script."""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.schema.run_plan import load_plan
from kit.training.unused_packages import skip_unused_packages
from kit.worker import main


def pace_in_turns(block: int) -> None:
    """What `kit watch` shows of the ranks, for `block` steps with it and `block` steps without, in turns."""
    import kit.training.trainer
    from kit.training.rank_timing import RankTimer

    class Turns(RankTimer):
        begun_steps = 0

        def on(self):
            return (self.begun_steps - 1) // block % 2 == 0

        def time_batches(self, batches):
            self.begun_steps += 1
            return super().time_batches(batches) if self.on() else batches

        def start_forward(self, module, *rest):
            if self.on():
                super().start_forward(module, *rest)

        def end_forward(self, module, *rest):
            if self.on():
                super().end_forward(module, *rest)

        def exchange(self):
            if self.on():
                super().exchange()

    kit.training.trainer.Pace = Turns


if __name__ == "__main__":
    folder = os.environ.get("KIT_BENCH_PROFILE")
    # As in a run without a script of one's own; what is imported below needs none of them.
    skip_unused_packages(load_plan(next(word for word in sys.argv if word.endswith("plan.json"))))
    if folder:  # imports are clocked too
        from profiling import Profile, StackSampler

        sampler = StackSampler()
    from clock import Clock, watched

    import kit.models.load

    if block := os.environ.get("KIT_BENCH_PACE_BLOCK"):
        pace_in_turns(int(block))
    kit.models.load.load_model = watched(kit.models.load.load_model)
    counters: list[Any] = []
    if file := os.environ.get("KIT_BENCH_HOOKS"):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
        from fetches import FetchCounter

        counters.append(FetchCounter(Path(file)))
    if folder:
        counters.append(Profile(Path(folder), sampler))
    main(callbacks=[Clock(), *counters])
