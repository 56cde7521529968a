"""Documents that share a packed row must not see each other: proven on the very model that is about to train.

Whether they do is decided by architecture, attention implementation and installed kernels together: a mask made from
positions keeps attention apart, a convolution or a running state knows nothing of positions. So one packed batch goes
through the forward pass of training, and so does each of its documents alone, and alone but padded, which shows what
rounding does with this model on this hardware. Compared are the log-probabilities, all that the loss is made of.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from kit.errors import KitError
from kit.storage.json_files import atomic_write_json, read_json_or_empty
from kit.system import paths
from kit.training.checkpoint import gather_objects

LENGTHS = (23, 41, 9, 30)  # together more than a chunk of linear attention (64), each within any model's positions
MARGIN = 3  # times what padding changes
# Padding changes log-probabilities by 3 to 20 roundings of the working precision, relative to how far they spread, and
# in some kernels by nothing. Then 2 are taken, beside 4 of the float32 in which the log-probabilities themselves come.
FLOOR, LAST_FLOOR = 2, 4
# In a mixture of experts rounding alone can make a router choose another expert. That happens with some ids, a leak
# happens with all: other ids are tried, and the widest rounding of all tries counts.
TRIES = 3
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "kernels", "liger-kernel", "flash-attn",
            "flash-linear-attention", "fla-core", "causal-conv1d", "mamba-ssm")  # fmt: skip
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class PackingProofCallback(TrainerCallback):
    """Proves it where training begins: only there has every engine put the model where, and as, it trains."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.packing_proof = prove_packing(self.trainer)


def prove_packing(trainer: Any) -> dict[str, float] | None:
    """Return the largest `difference` between documents packed and alone, and the one `allowed`. Collective.

    None where nothing is packed. KitError where they see each other, or where the model takes no packed rows. What was
    proven is remembered, a failure is not. Random state, modes and buffers are as before.
    """
    if not trainer.padding_free:
        return None
    base = unwrap(trainer)
    setting = describe_setting(trainer, base)
    name = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]
    file = paths.kit_cache_folder() / "packing" / f"{name}.json"
    known = read_json_or_empty(file) if type(base).__module__.startswith("transformers.") else {}  # code may change
    # Rank 0 decides: another node has another cache.
    proof = gather_objects(known.get("proof"), trainer.ranks)[0]
    if proof is None:
        with leave_as_it_was(trainer.model):
            proof = compare_until_apart(trainer, base)
    figures = f"largest difference {proof['difference']:.1e}, allowed {proof['allowed']:.1e}"
    if not proof["difference"] <= proof["allowed"]:  # also where it is not a number
        model = f"{setting['architecture']}, {setting['attention']}"
        raise refusal(trainer, f"packed documents leak into each other with this model ({model}): {figures}")
    if trainer.args.process_index == 0:
        print(f"packing   documents stay apart ({figures}{', proven before' if known else ''})", flush=True)
        with suppress(OSError):  # the next run proves it again
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(file, {"proof": proof, "setting": setting})
    return proof


def unwrap(trainer: Any) -> Any:
    """The transformers model below engine and adapter."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def refusal(trainer: Any, problem: str) -> KitError:
    where = "trainer.packing" if trainer.args.packing else "trainer.padding_free"
    return KitError(problem, where=where, fix="trainer.packing=false trainer.padding_free=false")


def describe_setting(trainer: Any, base: Any) -> dict[str, Any]:
    """All with which a leak comes or goes, as JSON knows it."""
    args, config = trainer.args, {k: v for k, v in base.config.to_dict().items() if k != "_name_or_path"}
    cuda = args.device.type == "cuda"
    return {
        "architecture": type(base).__name__,
        "attention": str(base.config._attn_implementation),
        "experts": str(getattr(base.config, "_experts_implementation", None)),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "adapters": sorted(str(c.peft_type) for c in getattr(trainer.model, "peft_config", {}).values()),
        "precisions": [*sorted({str(p.dtype) for p in base.parameters()}), trainer.accelerator.mixed_precision,
                       torch.get_float32_matmul_precision()],
        "rows": [type(trainer.data_collator).__qualname__, args.packing, args.pad_to_multiple_of],
        "kernels": [bool(args.use_liger_kernel), bool(getattr(base, "use_kernels", False))],
        "engine": str(trainer.accelerator.distributed_type),
        "device": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
    }  # fmt: skip


@contextmanager
def leave_as_it_was(model: Any) -> Iterator[None]:
    """Inside, the model is in eval mode and makes no gradients; after it modes, buffers and random state are back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
        random.setstate(python)
        np.random.set_state(arrays)


def compare_until_apart(trainer: Any, base: Any) -> dict[str, float]:
    """The first try in which packed documents are as they are alone, else the last; the worst of all ranks."""
    allowed = 0.0
    for seed in range(TRIES):
        figures = gather_objects(compare_documents(trainer, base, seed), trainer.ranks)
        difference, rounding = np.max(figures, axis=0).tolist()  # "not a number" stays one
        allowed = max(allowed, MARGIN * rounding)
        if difference <= allowed:
            break
    return {"difference": difference, "allowed": allowed}


def compare_documents(trainer: Any, base: Any, seed: int) -> tuple[float, float]:
    """How far log-probabilities are from those of the document alone: when it is packed, and by rounding."""
    documents = draw_documents(trainer, base, seed)
    rows = [{"input_ids": d, "labels": d} for d in documents]
    if trainer.args.packing:
        rows = [{k: first[k] + second[k] for k in first} | {"seq_lengths": [len(first["labels"]), len(second["labels"])]}
                for first, second in zip(rows[::2], rows[1::2], strict=True)]  # fmt: skip
    try:
        packed = log_probabilities(trainer, trainer.data_collator(rows))[0]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise refusal(trainer, f"{type(base).__name__} takes no packed documents: {error}") from error
    longest, pad = max(LENGTHS), trainer.data_collator.pad_token_id
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in LENGTHS])
    ids = torch.tensor([d + [pad] * (longest - len(d)) for d in documents])
    padded = log_probabilities(trainer, {"input_ids": ids, "labels": ids, "attention_mask": mask})
    alone = [log_probabilities(trainer, {"input_ids": torch.tensor([d]), "labels": torch.tensor([d])})[0]
             for d in documents]  # fmt: skip
    starts = np.cumsum([0, *LENGTHS])
    moved = [packed[s : s + len(own)] - own for s, own in zip(starts, alone, strict=False)]
    rounded = [padded[i, : len(own)] - own for i, own in enumerate(alone)]
    own = torch.cat(alone)
    dtypes = {p.dtype for p in base.parameters() if p.dtype in PRECISIONS.values()}
    eps = max(torch.finfo(t).eps for t in {*dtypes, PRECISIONS[trainer.accelerator.mixed_precision]})
    floor = FLOOR * eps * own.std() + LAST_FLOOR * torch.finfo(torch.float32).eps * own.abs().max()
    return float(torch.cat(moved).abs().max()), float(torch.maximum(torch.cat(rounded).abs().max(), floor))


def draw_documents(trainer: Any, base: Any, seed: int) -> list[list[int]]:
    """Documents of LENGTHS, of ids that stand for text: the same on all ranks, whose forward passes may be one."""
    config = base.config.get_text_config()
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    marks = {v for part in (base.config, config) for k, v in vars(part).items() if k.endswith(("_id", "_index"))
             and isinstance(v, int)}  # fmt: skip
    ids = np.setdiff1d(np.arange(config.vocab_size), [*marks, *tokenizer.all_special_ids])
    generator = np.random.default_rng(seed)
    return [generator.choice(ids, n).tolist() for n in LENGTHS]


def log_probabilities(trainer: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Of each next token, float32 (rows, tokens - 1), as SFTTrainer.compute_loss asks the model for them."""
    with trainer.compute_loss_context_manager():
        outputs = trainer.model(**trainer._prepare_inputs({**batch, "use_cache": False}), fused_lm_head=True)
    # A trained prompt stands in front. The collator leaves labels at document starts out: nothing is compared there.
    return outputs.log_probs[:, 1 - batch["input_ids"].size(1) :].float().cpu()
