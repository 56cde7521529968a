"""A training script in which rank 1 is out of memory with more than one row, while the others wait for it."""

import os

from kit.worker import main

if __name__ == "__main__":
    import torch
    from transformers import TrainerCallback

    class OutOfMemory(TrainerCallback):
        def on_init_end(self, args, state, control, model=None, **kwargs):
            def fail(*_):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

            if os.environ.get("RANK") == "1" and args.per_device_train_batch_size > 1:
                model.register_forward_pre_hook(fail)

    main(callbacks=[OutOfMemory()])
