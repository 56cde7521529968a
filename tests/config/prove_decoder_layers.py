"""Which architectures train the same when ZeRO-3 gathers their decoder layers whole; by hand, minutes:

    DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=.:tests deepspeed --num_gpus 2 tests/config/prove_decoder_layers.py

(or with names of architectures, whose verdicts are then written anew)
Each causal architecture of which a tiny model can be made takes three optimizer steps with LoRA (with checkpointing,
and without), and three of full fine-tuning; their losses are compared with one process that sees both ranks' rows.
Writes decoder_layers.json, from which make_architectures.py takes what is filled. Zero gradients of a layer, which a
leaf module reduces where no input of it requires a gradient, do not pass: FAULT=1 leaves out what prevents them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from make_architectures import PROVEN, decoder_layers
from peft import LoraConfig, get_peft_model
from tiny_architectures import APART, EXPERTS, GPT2, LEAKING, LINEAR, REFUSING, STATE, WITHOUT_SDPA, model_of
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

STEPS, CLOSE, LARGEST = 3, 1e-5, 3_000_000  # losses, absolute, float32; parameters of a model that is tiny
LATENT = {
    **EXPERTS, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip
KNOWN = {**REFUSING, **LEAKING, **WITHOUT_SDPA, **APART}
GUESSES: list[dict[str, Any]] = [
    {}, EXPERTS, LATENT, GPT2, {**STATE, **EXPERTS}, LINEAR, {**LINEAR, **EXPERTS},
]  # fmt: skip


DROPOUTS = """dropout attention_dropout activation_dropout hidden_dropout residual_dropout layerdrop resid_pdrop
    embd_pdrop attn_pdrop""".split()


def rows(rank: int) -> torch.Tensor:
    return torch.randint(4, 90, (2, 24), generator=torch.Generator().manual_seed(100 + rank))


def tiny_model(kind: str) -> Any:
    """A model that computes a loss; the last error where no guess at the sizes makes one."""
    error: Exception = ValueError("larger than tiny")
    for changes in [KNOWN[kind]] if kind in KNOWN else GUESSES:
        try:
            model = model_of(kind, **dict.fromkeys(DROPOUTS, 0.0), **changes)
            if sum(p.numel() for p in model.parameters()) < LARGEST:
                model(input_ids=rows(0), labels=rows(0), use_cache=False).loss.item()
                return model.train()
        except Exception as failed:
            error = failed
    raise error


def prepared(kind: str, lora: bool, checkpointing: bool) -> Any:
    """The model as TRL and the kit prepare it, without dropout; B of LoRA is drawn, so that A trains at once."""
    model = tiny_model(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    if not lora:
        return model
    adapter = LoraConfig(r=4, target_modules="all-linear")
    wrapped: Any = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.02)
    if not os.environ.get("FAULT"):
        model.enable_input_require_grads()
    return wrapped


def optimizer(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)


def loss_of(model: Any, rank: int) -> torch.Tensor:
    return model(input_ids=rows(rank), labels=rows(rank), use_cache=False).loss


def one_process(kind: str, lora: bool, rank: int) -> list[float]:
    """The losses of a rank's rows while both ranks' rows train the model."""
    model = prepared(kind, lora, False)
    steps, losses = optimizer(model), []
    for _ in range(STEPS):
        both = [loss_of(model, r) for r in (0, 1)]
        (sum(both) / 2).backward()  # type: ignore[union-attr]
        steps.step()
        steps.zero_grad()
        losses.append(both[rank].item())
    return losses


def zero3(kind: str, lora: bool, checkpointing: bool, classes: list[str], rank: int) -> list[float]:
    model = prepared(kind, lora, checkpointing)
    zero = {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2000,
        "reduce_bucket_size": 5000, "leaf_module": {"classes": classes},
    }  # fmt: skip
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
              "zero_optimization": zero}  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]
    losses = []
    for _ in range(STEPS):
        loss = loss_of(engine, rank)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def judge(kind: str, rank: int) -> str:
    """ "" where the losses of this rank are equal, else what differs or fails."""
    classes = decoder_layers(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    if not classes:
        return "no layer class is named by _no_split_modules"
    try:
        names = {type(m).__name__ for m in tiny_model(kind).modules()}
    except Exception as error:
        return f"no tiny model: {type(error).__name__}"
    if not names & set(classes):
        return "the tiny model has none of these layers"
    for lora in (True, False):
        try:
            expected = one_process(kind, lora, rank)
        except Exception as error:
            return f"does not train in one process: {type(error).__name__}"
        for checkpointing in (True, False) if lora else (False,):
            arm = f"{'LoRA' if lora else 'full'}{', checkpointing' * checkpointing}"
            try:
                losses = zero3(kind, lora, checkpointing, classes, rank)
            except Exception as error:
                return f"{arm}: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            if (apart := max(abs(a - b) for a, b in zip(losses, expected, strict=True))) > CLOSE:
                return f"{arm}: losses differ by {apart:.0e}"
    return ""


def write(kind: str, verdict: str) -> None:
    """Put one verdict into the file, in the place of an older one."""
    held = json.loads(PROVEN.read_text()) if PROVEN.exists() else {"equal": [], "not_filled": {}}
    made_from = {name: version(name) for name in ("deepspeed", "transformers", "torch", "peft")}
    other = {**held["not_filled"], kind: verdict}
    found = {
        "generated_from": made_from,
        "equal": sorted({k for k in held["equal"] if k != kind} | ({kind} - {k for k, why in other.items() if why})),
        "not_filled": {k: why for k, why in sorted(other.items()) if why},
    }
    PROVEN.write_text(json.dumps(found, indent=1) + "\n")


def main(asked: list[str]) -> None:
    table = Path(__file__).parents[2] / "kit" / "inspection" / "architectures.json"
    kinds = asked or json.loads(table.read_text())["kinds"]["causal"]
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank = torch.distributed.get_rank()
    for kind in kinds:
        both: list[Any] = [None, None]
        torch.distributed.all_gather_object(both, judge(kind, rank))
        if rank == 0:
            print(kind, both[0] or both[1] or "equal", flush=True)
            if not os.environ.get("FAULT"):
                write(kind, both[0] or both[1])
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
