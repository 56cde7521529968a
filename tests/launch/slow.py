"""A user's own training script (`launch.script=`): every step takes KIT_TEST_STEP seconds more."""

import os
import time

from kit.worker import main

if __name__ == "__main__":
    # Only started as a script: the stack comes in after main() has prepared the process, so it stands in the class.
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(float(os.environ.get("KIT_TEST_STEP", "0")))

    main(callbacks=[Slow()])
