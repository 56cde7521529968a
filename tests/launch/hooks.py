"""A user's own training script (`launch.script=`): early stopping, and a signal to one rank under KIT_TEST_SIGNAL."""

import os
import signal

from kit.worker import main

if __name__ == "__main__":
    # Only started as a script: imports of the stack come after main() has prepared the process, so they stand in
    # classes.
    from transformers import EarlyStoppingCallback, TrainerCallback

    class SignalAt(TrainerCallback):
        """SIGTERM to rank 1 alone at the step in KIT_TEST_SIGNAL."""

        def on_step_begin(self, args, state, control, **kwargs):
            if os.environ.get("KIT_TEST_SIGNAL") == str(state.global_step) and os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    patience = int(os.environ.get("KIT_TEST_PATIENCE", "0"))
    main(callbacks=[SignalAt(), *([EarlyStoppingCallback(patience)] if patience else [])])
