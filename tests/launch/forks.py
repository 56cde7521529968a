"""Trials in forks of a process that has imported and done nothing else: as cold as can be without paying the imports.

    python forks.py '[["", "a/plan.json"], ["seed", "b/plan.json", "c/plan.json"]]'

A job is a fault and its plans. Without a fault a plan has a process of its own; with one the plans share a warm worker
in which that is not made anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kit import worker


def spoil(fault: str) -> None:
    """Leave something of the trial before in place, as a worker with a mistake in it would."""
    import transformers.trainer
    import trl.trainer.sft_trainer

    from kit.sweeps import warm_worker

    if fault in ("adapter", "adapter-unseen"):
        warm_worker.restore_model = lambda before: None
    if fault == "adapter-unseen":  # the comparison with the loaded base would find it
        warm_worker.tensor_checksums = lambda model: []
    if fault == "seed":
        for module in (transformers, transformers.trainer, trl.trainer.sft_trainer):
            module.set_seed = lambda *_, **__: None
    if fault == "base":
        reset = warm_worker.restore_model

        def change_then_restore(before) -> None:
            before[2][0][1].add_(1)  # the first parameter's tensor
            reset(before)

        warm_worker.restore_model = change_then_restore


def share(fault: str, plans: list[Path]) -> None:
    """What a warm worker does with its trials; the answers go to standard output."""
    from kit.sweeps import warm_worker
    from kit.training import signals

    answers = os.fdopen(os.dup(1), "w")
    signals.install_handlers()
    warm_worker.install_tees()
    held = warm_worker.WarmState()
    for number, plan in enumerate(plans):
        if number == 1 and fault == "seed":
            spoil(fault)
        elif number == 0 and fault != "seed":
            spoil(fault)
        code, why = warm_worker.run_trial(plan, held)
        print(json.dumps([fault, number, code, why]), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import kit.training.run
    import kit.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    codes = []
    for fault, *plans in json.loads(sys.argv[1]):
        for group in [plans] if fault else [[plan] for plan in plans]:
            pid = os.fork()
            if pid == 0:  # its first call makes torch's thread pool anew; two threads that call at once find none
                torch.set_num_threads(1)
            if pid == 0 and fault:
                share(fault, [Path(p) for p in group])
            elif pid == 0:
                worker.main(group)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit(max(codes, default=0))
