"""A training script in which rank 1 is slower than the others, and every step waits until the test lets it go on."""

import os
import time
from pathlib import Path

from kit.worker import main

if __name__ == "__main__":
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        """Forward passes of rank 1 take 50 ms more. After KIT_TEST_PAUSE_AT steps: wait for the file KIT_TEST_GO."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if os.environ.get("RANK") == "1":
                model.register_forward_pre_hook(lambda *_: time.sleep(0.05))

        def on_step_begin(self, args, state, control, **kwargs):
            while (
                state.global_step == int(os.environ["KIT_TEST_PAUSE_AT"])
                and not Path(os.environ["KIT_TEST_GO"]).exists()
            ):
                time.sleep(0.1)

    main(callbacks=[Slow()])
