"""A user's own training script for sweeps: r=8 fails on purpose; KIT_TEST_PAUSE seconds after every step."""

import json
import os
import sys
import time
from pathlib import Path

from kit.worker import main

if __name__ == "__main__":
    if json.loads(Path(sys.argv[1]).read_text())["peft"]["r"] == 8:
        sys.exit("it fails on purpose")

    from transformers import TrainerCallback

    class Pause(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(float(os.environ.get("KIT_TEST_PAUSE", "0")))

    main(callbacks=[Pause()])
