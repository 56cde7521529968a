"""Several plans in one launch: it costs half a minute of imports, a tiny run a second. `sequence.py PLAN.json ...`

`PLAN.json@checkpoint-2` goes on from that checkpoint of the run.

Each plan goes through kit.training.run.train exactly as kit.worker calls it; only the libraries' per-process state is
reset between them, which a user's one-run process never needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from kit.schema.run_plan import load_plan
from kit.training.unused_packages import skip_unused_packages
from kit.worker import prepare_process


def main(paths: list[str], callbacks: Sequence[Any] = ()) -> None:
    plans = [load_plan(path.partition("@")[0]) for path in paths]
    prepare_process(plans[0], int(os.environ.get("RANK", "0")))
    skip_unused_packages(*plans)
    import torch.distributed
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    import kit.training.run as training

    # The process group must outlive a run here; in a user's process it ends with it.
    torch.distributed.destroy_process_group = lambda *a, **k: None
    for path in paths:
        plan, _, checkpoint = path.partition("@")
        counted = [*callbacks]
        if load_plan(plan).zero_stage == 3:
            from fetches import FetchCounter

            counted.append(FetchCounter())
        assert training.train(load_plan(plan), resume=checkpoint or None, callbacks=counted) == 0
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
