"""Documents that share a packed row must not see each other: proven on the very model that is about to train.

Architecture, attention and installed kernels decide it together. So one packed batch goes through the forward pass of
training, each document alone, and alone but padded, which tells rounding; compared is all that the loss is made of.
"""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from kit.errors import FAILED, KitError
from kit.storage.json_files import atomic_write_json, read_json_or_empty
from kit.system import paths
from kit.training.checkpoint import gather_objects
from kit.training.keep_state import keep_state

LENGTHS = (23, 41, 9, 30)  # together more than a chunk of linear attention (64), each within any model's positions
# Times what padding changes: log-probabilities by 3 to 40 roundings of the working precision, relative to how far they
# spread, and in some kernels by nothing. Then FLOOR are taken, and 4 of the float32 in which they themselves come.
MARGIN, FLOOR, LAST_FLOOR = 3, 2, 4
TRIES = 3  # rounding makes a router choose another expert with some ids; a leak is there with any
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "kernels", "liger-kernel", "flash-attn",
            "flash-linear-attention", "fla-core", "causal-conv1d", "mamba-ssm")  # fmt: skip
REFUSAL = "trainer.packing", "trainer.packing=false trainer.padding_free=false"  # where, fix
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class PackingProofCallback(TrainerCallback):
    """Proves it where training begins: only there has every engine put the model where, and as, it trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.packing_proof = prove_packing(self.trainer)


def prove_packing(trainer: Any) -> dict[str, float] | None:
    """Return the largest `difference` between documents packed and alone, and the one `allowed`; None: no packing.

    Collective. KitError where they see each other. Only a proof is remembered; random state and buffers stay.
    """
    if not trainer.padding_free:
        return None
    base = unwrap_base(trainer)
    setting = describe_setting(trainer, base)
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    file = paths.kit_cache_folder() / "packing" / f"{name}.json"
    # Code that a base brings changes without a version. Rank 0 says what is known: another node has another cache.
    known = read_json_or_empty(file).get("proof") if type(base).__module__.startswith("transformers.") else None
    known = gather_objects(known, trainer.ranks)[0]
    proof = known or compare_until_apart(trainer, base)
    figures = f"largest difference {proof['difference']:.1e}, allowed {proof['allowed']:.1e}"
    if not proof["difference"] <= proof["allowed"]:  # also where it is not a number
        model = "this model ({architecture}, {attention})".format(**setting)
        raise KitError(f"packed documents leak into each other with {model}: {figures}", *REFUSAL)
    if trainer.args.process_index == 0:
        print(f"packing   documents stay apart ({figures}{', proven before' if known else ''})", flush=True)
        with suppress(OSError):  # then the next run proves it again
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(file, {"proof": proof, "setting": setting})
    return proof


def unwrap_base(trainer: Any) -> Any:
    """The base model that a trainer trains, without an engine's and PEFT's wrapping."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def describe_setting(trainer: Any, base: Any) -> dict[str, Any]:
    """All with which a leak comes or goes, as JSON knows it."""
    args, config = trainer.args, base.config.to_dict() | {"_name_or_path": ""}
    return {
        "architecture": type(base).__name__,
        "attention": str(base.config._attn_implementation),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "adapters": sorted(str(c.peft_type) for c in getattr(trainer.model, "peft_config", {}).values()),
        "precision": [*sorted({str(p.dtype) for p in base.parameters()}), trainer.accelerator.mixed_precision],
        "kernels": [args.use_liger_kernel, base.use_kernels, str(base.config._experts_implementation)],
        "engine": [trainer.accelerator.distributed_type, type(trainer.data_collator).__qualname__],
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else platform.machine(),
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
    }


def compare_until_apart(trainer: Any, base: Any) -> dict[str, float]:
    """The first try in which packed documents are as they are alone, else the last; the worst of all ranks."""
    allowed = 0.0
    with keep_state(trainer.model), torch.no_grad():
        trainer.model.eval()
        for seed in range(TRIES):
            figures = gather_objects(compare_documents(trainer, base, seed), trainer.ranks)
            difference, rounding = np.max(figures, axis=0).tolist()  # "not a number" stays one
            allowed = max(allowed, MARGIN * rounding)
            if difference <= allowed:
                break
    return {"difference": difference, "allowed": allowed}


def compare_documents(trainer: Any, base: Any, seed: int) -> tuple[float, float]:
    """How far log-probabilities are from those of the document alone: when it is packed, and by rounding."""
    documents = draw_documents(trainer.processing_class, base.config, seed)
    rows = [{"input_ids": a + b, "labels": a + b, "seq_lengths": [len(a), len(b)]}
            for a, b in (documents[:2], documents[2:])]  # fmt: skip
    try:
        packed = log_probabilities(trainer, trainer.data_collator(rows))[0]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise KitError(f"{type(base).__name__} takes no packed documents: {error}", *REFUSAL) from error
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    ids = torch.full(mask.shape, trainer.data_collator.pad_token_id)
    ids[mask] = torch.tensor(sum(documents, []))
    padded = log_probabilities(trainer, {"input_ids": ids, "labels": ids, "attention_mask": mask.long()})
    single = [torch.tensor([d]) for d in documents]
    alone = torch.cat([log_probabilities(trainer, {"input_ids": d, "labels": d})[0] for d in single])
    if not alone.isfinite().all():
        fix = "model.dtype=float32 trainer.bf16=false shows whether the precision does it; else another base"
        problem = "the base's own log-probabilities are not finite"
        raise KitError(problem, "model.name_or_path", fix, code=FAILED)
    ends = np.cumsum(LENGTHS) - 1  # where a packed row predicts the next document, which is in no loss
    moved = packed[np.delete(np.arange(ends[-1]), ends[:-1])] - alone
    dtypes = {PRECISIONS[trainer.accelerator.mixed_precision], *(p.dtype for p in base.parameters())}
    eps = max(torch.finfo(t).eps for t in dtypes.intersection(PRECISIONS.values()))
    floor = FLOOR * eps * alone.std() + LAST_FLOOR * torch.finfo(torch.float32).eps * alone.abs().max()
    return float(moved.abs().max()), float(torch.maximum((padded[mask[:, 1:]] - alone).abs().max(), floor))


def draw_documents(tokenizer: Any, config: Any, seed: int) -> list[list[int]]:
    """Documents of LENGTHS, of ids that stand for text: the same on all ranks, whose forward passes may be one."""
    ids = text_ids(tokenizer, config)
    return [np.random.default_rng(seed + n).choice(ids, n).tolist() for n in LENGTHS]


def text_ids(tokenizer: Any, config: Any) -> Any:
    """The token ids that stand for text, as an array: without special tokens, images and the like."""
    named = vars(config) | vars(config.get_text_config())  # images and the like have ids too
    marks = [v for k, v in named.items() if k.endswith(("_token_id", "_token_index")) and isinstance(v, int)]
    return np.setdiff1d(np.arange(config.get_text_config().vocab_size), marks + tokenizer.all_special_ids)


def log_probabilities(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of each next token, float32 (rows, tokens - 1), as SFTTrainer.compute_loss asks the model for them."""
    with trainer.compute_loss_context_manager():
        outputs = trainer.model(**trainer._prepare_inputs({**batch, "use_cache": False}), fused_lm_head=True)
    return outputs.log_probs[:, 1 - batch["input_ids"].size(1) :].float().cpu()  # a trained prompt stands in front
