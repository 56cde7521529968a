"""The merge of whatever the streaming merge does not compute itself: peft on the CPU, in float32, rounded once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.merging.parts import MergePlan
from kit.storage.safetensors_header import read_header


def write_through_peft(plan: MergePlan, folder: Path, dtype: str | None) -> dict[str, Any]:
    """Load base + adapter, merge, save into `folder`; needs memory for the base in float32. Gives the figures."""
    import torch

    from kit.merging.logits import load_merge_base
    from kit.merging.stream import torch_dtype
    from kit.models.adapters import attach_adapter

    started = time.perf_counter()
    stored = [t.dtype for t in plan.tensors.values() if t.dtype in ("F64", "F32", "F16", "BF16")]
    kept = getattr(torch, dtype) if dtype else torch_dtype(max(set(stored), key=stored.count))
    try:
        model = attach_adapter(load_merge_base(plan, torch.float32), plan.adapter.opened).to(torch.float32)
        if model.peft_config["default"].is_prompt_learning:
            raise ValueError("it puts trained tokens before the prompt and changes no weight of the base")
        model = model.merge_and_unload(safe_merge=True).to(kept)
        model.save_pretrained(folder)
    except KitError:
        raise
    except (ValueError, RuntimeError, AttributeError, NotImplementedError, KeyError, TypeError) as error:
        raise KitError(
            f"peft cannot merge this adapter ({plan.through_peft}): {error}",
            where=str(plan.adapter.folder),
            fix="use it unmerged, as base + adapter",
        ) from error
    files = sorted(folder.glob("*.safetensors"))
    tensors = [t for file in files for t in read_header(file)]
    return {
        "seconds": time.perf_counter() - started,
        "fsync_seconds": None,
        "bytes": sum(f.stat().st_size for f in files),
        "tensors": [],
        "written": len(tensors),
    }
