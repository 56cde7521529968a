"""Trials as cold as can be without the imports: each in a fork of a process that has imported and done nothing else."""

import os
import sys

from kit import worker

if __name__ == "__main__":
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import kit.training.run
    import kit.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    codes = []
    for plan in sys.argv[1:]:
        pid = os.fork()
        if pid == 0:
            worker.main([plan])
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sys.exit(max(codes, default=0))
