"""`launch.script` of the engines benchmark: the kit's own worker with the same clock as the peer's script."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kit.worker import main

if __name__ == "__main__":
    import time

    begun = time.time()
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Wall-clock time at the end of every step, with the device idle; written beside the plan."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.at.append(time.time())

        def on_train_end(self, args, state, control, **kwargs):
            if os.environ.get("RANK", "0") == "0":
                run = Path(args.output_dir).parent
                (run / "clock.json").write_text(json.dumps({"begun": begun, "step_ends": self.at}))

    main(callbacks=[Clock()])
