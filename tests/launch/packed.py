"""sequence.py over quantized bases, `packed.py PLAN.json ...`: each rank leaves hashes of its packed weights."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path


def sha256(tensor) -> str:
    import torch

    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def packed_hashes(model) -> dict[str, list[str]]:
    """{layer: hashes of its packed weight and of its scales} of every quantized layer. Collective under ZeRO-3."""
    import bitsandbytes as bnb

    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        weight = module.weight
        if isinstance(module, bnb.nn.Linear4bit):
            state = weight.quant_state or module.quant_state
            scales = [state.absmax, *([state.offset, state.state2.absmax] if state.nested else [])]
        else:
            scales = [weight.SCB if weight.SCB is not None else module.state.SCB]
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                bits = sha256(weight.data)
        else:
            bits = sha256(weight.data)
        found[name.removeprefix("base_model.model.").removesuffix(".base_layer")] = [bits, *map(sha256, scales)]
    return found


if __name__ == "__main__":
    # sequence.main() prepares the process before it imports the stack, so the callback cannot be a class up here.
    import sequence

    class LeaveHashes:
        """A TrainerCallback by its methods: hashes of the packed weights at the end, and the adapter's dtypes."""

        def __getattr__(self, name):
            if not name.startswith("on_"):
                raise AttributeError(name)
            return lambda *args, **kwargs: None

        def on_train_end(self, args, state, control, model=None, **kwargs):
            while hasattr(model, "module"):
                model = model.module
            dtypes = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
            found = {"hashes": packed_hashes(model), "dtypes": dtypes}
            file = Path(args.output_dir).parent / f"packed-{os.environ.get('RANK', '0')}.json"
            file.write_text(json.dumps(found))

    sequence.main(sys.argv[1:], [LeaveHashes()])
