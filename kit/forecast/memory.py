"""The GPU memory of a training step as terms, each with its formula and source; the peak is that of the worst phase.

Bytes are those of torch's allocator on one GPU (`torch.cuda.max_memory_allocated`); what stands beside it (CUDA's
context, fragments; NCCL's buffers are not counted) is `outside_allocator`. One process, DDP and ZeRO-1/2/3, with and
without offloads.
tests/benchmarks/results/ holds the peaks that were measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kit.forecast.activations import adapter_rank, saved_per_token, sizes
from kit.forecast.head import head_bytes
from kit.inspection.architectures import OUTPUT_EMBEDDINGS
from kit.inspection.trainable import count_trained, list_modules, with_defaults
from kit.schema.checkpointing import checkpointing_kwargs, is_checkpointed
from kit.schema.dotted import value_at

# `loaded`: from loading on; `always`: from the first step on.
Phase = Literal["loaded", "load", "always", "forward", "loss", "backward", "step", "evaluate", "save"]
# The terms that stand in memory at each peak: what the forward pass leaves is there through the backward.
PHASES: dict[str, tuple[Phase, ...]] = {
    "load": ("loaded", "load"),
    "loss": ("loaded", "always", "forward", "loss"),
    "backward": ("loaded", "always", "forward", "backward"),
    "step": ("loaded", "always", "step"),
    "evaluate": ("loaded", "always", "evaluate"),
    "save": ("loaded", "always", "save"),
}

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Optimizer states in bytes a parameter, as multiples of the parameter's own width: torch's and transformers' Adam keep
# two of the parameter's dtype; bitsandbytes' 8-bit ones two bytes and a float32 scale for each block of 256.
STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adamw_apex_fused": 2, "lion_32bit": 1, "sgd": 0, "adagrad": 1}
STATES_8BIT = 2 * (1 + 4 / 256)
# Bytes of an nf4 weight with its share of a float32 scale for each 64, by whether the scales are quantized themselves.
NF4_BYTES = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
CONTEXT_BYTES = 0.6e9  # CUDA's context with its kernels
SUB_GROUP_SIZE = 1e9  # DeepSpeed's default
DISTANCE = 1e9  # DeepSpeed's default of stage3_max_reuse_distance
# Of the allocated peak: the largest difference from a recorded one, tests/benchmarks/results/ and tests/forecast, but
# for nf4 as TRL loads it.
FORECAST_ERROR = 0.06
FRAGMENTS = 0.05  # of what the allocator holds; rounding to blocks and what lies between them


@dataclass(frozen=True)
class Term:
    """One part of the memory of a step: how many bytes, in which phase, by which formula and whose finding."""

    name: str
    bytes: float
    phase: Phase
    formula: str
    source: str


@dataclass
class Memory:
    """The terms of one GPU's memory. `exact`: every term is known for this architecture, none stands for another."""

    terms: list[Term] = field(default_factory=list)
    exact: bool = True

    def add(self, name: str, size: float, phase: Phase, formula: str, source: str) -> None:
        if size:
            self.terms.append(Term(name, size, phase, formula, source))

    def of(self, *phases: Phase) -> float:
        return sum(term.bytes for term in self.terms if term.phase in phases)

    @property
    def peaks(self) -> dict[str, float]:
        """Return the bytes at the peak of each phase that has terms of its own."""
        own = {term.phase for term in self.terms}
        return {name: self.of(*phases) for name, phases in PHASES.items() if phases[-1] in own or name == "step"}

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def outside_allocator(self) -> float:
        return CONTEXT_BYTES + FRAGMENTS * self.peak


@dataclass(frozen=True)
class Step:
    """One micro-step of a run: what the terms are computed from. Sizes in tokens, rows and processes."""

    peft: Mapping[str, Any] | None
    quantization: Mapping[str, Any] | None
    deepspeed: Mapping[str, Any] | None
    trainer: Mapping[str, Any]
    weights: str  # dtype of the loaded base
    precision: str  # dtype that the step computes in
    processes: int
    rows: int
    tokens: int  # of all rows, padding included
    attention: str | None = None  # attn_implementation; None: transformers' choice

    @property
    def stage(self) -> int:
        stage = value_at(dict(self.deepspeed or {}), "zero_optimization.stage")
        return stage if isinstance(stage, int) else 0

    def offloads(self, what: str) -> bool:
        """Return whether "optimizer" or "param" lies in host memory or on NVMe."""
        return self.offload_device(what) is not None

    def offload_device(self, what: str) -> str | None:
        """Return where "optimizer" or "param" lies: cpu, nvme, or None for the GPU."""
        device = value_at(dict(self.deepspeed or {}), f"zero_optimization.offload_{what}.device")
        return device if device in ("cpu", "nvme") and (what == "optimizer" or self.stage == 3) else None

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Return activation_checkpointing_kwargs; None where nothing is recomputed."""
        return checkpointing_kwargs(self.trainer) if is_checkpointed(self.trainer) else None


@dataclass(frozen=True)
class Sizes:
    """What all steps of a run are forecast from: how many parameters the base and its parts have."""

    text: dict[str, Any]  # config.json of the language model, with its class's defaults
    total: int
    trained: int
    linears: int  # in the matrices that bitsandbytes quantizes: all but the head's
    layers: int  # decoder layers
    largest_layer: int
    largest_end: int  # of embedding, last norm and head
    ends: int  # of all three
    widest: int = 0  # the longest side of a matrix in a layer
    rank: int = 0  # of the adapter's low-rank matrices
    inputs: int = 0  # of all those matrices together: what a token brings to them


def measure_sizes(config: Mapping[str, Any], peft: Mapping[str, Any] | None) -> Sizes | None:
    """Return what the table of architectures knows of a base and its adapter; None where it knows one of them not."""
    modules, trained = list_modules(dict(config)), count_trained(dict(config), dict(peft) if peft else None)
    if not (modules and trained):
        return None
    linears = inputs = widest = 0
    layers: dict[str, int] = {}
    ends: dict[str, int] = {}
    for name, module in modules.items():
        number = next((part for part in name.split(".") if part.isdigit()), None)
        part, key = (ends, name) if number is None else (layers, number)
        part[key] = part.get(key, 0) + sum(map(math.prod, module.shapes.values()))
        if module.kind in ("linear", "conv1d") and name.rpartition(".")[2] not in OUTPUT_EMBEDDINGS:
            linears += math.prod(module.shapes["weight"])
            inputs += module.shapes["weight"][module.kind == "linear"]  # Conv1D's has its inputs first
            widest = max(widest, *module.shapes["weight"])
    text, largest = with_defaults(dict(config)), max(layers.values(), default=0)
    return Sizes(
        text, trained.total, trained.numbers, linears, len(layers), largest, max(ends.values(), default=0),
        sum(ends.values()), widest, low_rank(peft), inputs,
    )  # fmt: skip


def low_rank(peft: Mapping[str, Any] | None) -> int:
    """Return the largest rank of a LoRA; 0 for other adapters and for none."""
    return adapter_rank(dict(peft)) if peft and str(peft.get("peft_type", "LORA")).upper() == "LORA" else 0


def forecast_memory(step: Step, base: Sizes) -> Memory:
    """Return the memory of a step on one GPU."""
    memory = Memory()
    _add_weights(memory, step, base)
    _add_training_state(memory, step, base)
    _add_activations(memory, step, base)
    _add_zero_buffers(memory, step, base)
    return memory


def weights_bytes(step: Step, base: Sizes) -> tuple[float, str]:
    """Return the bytes of the base on one GPU without sharding, and the formula.

    bitsandbytes quantizes the linears but the head's (transformers integrations/bitsandbytes.py, skipped modules).
    """
    width, quantization, total = DTYPE_BYTES[step.weights], step.quantization or {}, base.total
    if not quantization:
        return total * width, f"{total:,} parameters x {width} bytes"
    linears, four = base.linears, quantization.get("load_in_4bit")
    small = NF4_BYTES[bool(quantization.get("bnb_4bit_use_double_quant"))] if four else 1.0
    formula = f"{linears:,} quantized x {small:.4f} + {total - linears:,} x {width} bytes"
    return linears * small + (total - linears) * width, formula


def _add_weights(memory: Memory, step: Step, base: Sizes) -> None:
    size, formula = weights_bytes(step, base)
    source = "bitsandbytes functional.py" if step.quantization else "safetensors, model.dtype"
    if step.stage == 3:
        size, formula = size / step.processes, f"({formula}) / {step.processes} processes"
    if step.offloads("param"):
        size = 0  # what is gathered is a term of its own
    memory.add("base weights", size, "loaded", formula, source)


def _add_training_state(memory: Memory, step: Step, base: Sizes) -> None:
    """Add parameters of the adapter, gradients and optimizer states; under DeepSpeed also the float32 master copy.

    With the optimizer offloaded, ZeRO-1 and 2 hand gradients on as they are reduced: two of the largest are on their
    way. ZeRO-3's are said to lie in host memory (stage3.py), yet full fine-tuning of 8 billion parameters with both
    offloads took 16.1 GB on each of two H200s, as much as with them on the GPU: they are counted, and not exact.
    """
    trained = base.trained
    shards = step.processes if step.stage >= 2 else 1
    if step.deepspeed:
        width = DTYPE_BYTES[step.precision]
        if step.peft and not step.offloads("param"):
            kept = value_at(dict(step.deepspeed), "zero_optimization.stage3_param_persistence_threshold")
            whole = isinstance(kept, int) and 0 < base.rank * base.widest <= kept
            held = step.processes if step.stage == 3 and not whole else 1
            memory.add("adapter", trained * width / held, "always", f"{trained:,} x {width} / {held}", "engine.py")
        offloaded = step.offloads("optimizer")
        if offloaded and step.stage < 3:
            largest = min(trained, max(base.largest_end, base.largest_layer))
            formula = f"2 x {largest:,} x {width}"
            memory.add("gradients on their way", 2 * largest * width, "backward", formula, "stage_1_and_2.py")
            return
        # data_types.grad_accum_dtype unset: the gradients have the model's dtype.
        memory.add("gradients", trained * width / shards, "always", f"{trained:,} x {width} / {shards}", "stage3.py")
        if offloaded:
            memory.exact = False
            return
        split = step.processes if step.stage >= 1 else 1
        size, formula = trained * 12 / split, f"{trained:,} x (4 master + 8 Adam) / {split}"
        memory.add("optimizer", size, "always", formula, "DeepSpeed stage_1_and_2.py, stage3.py")
        group = value_at(dict(step.deepspeed), "zero_optimization.sub_group_size")
        stepped = trained / split  # ZeRO-3 steps group by group
        if step.stage == 3:
            stepped = min(stepped, group if isinstance(group, int | float) else SUB_GROUP_SIZE)
        memory.add("float32 gradients", stepped * 4, "step", f"{stepped:,.0f} x 4", "stage_1_and_2.py, stage3.py")
        return
    adapter = (
        2 if step.quantization and step.precision == "bfloat16" else 4
    )  # TRL's, else PEFT's autocast_adapter_dtype
    width = adapter if step.peft else DTYPE_BYTES[step.weights]
    if step.peft:
        memory.add("adapter", trained * width, "always", f"{trained:,} x {width}", "peft autocast_adapter_dtype")
    memory.add("gradients", trained * width, "always", f"{trained:,} x {width}", "torch")
    optim = str(step.trainer.get("optim") or "adamw_torch_fused")
    states = STATES_8BIT if "8bit" in optim else width * STATES.get(optim, 2)
    memory.add("optimizer", trained * states, "always", f"{trained:,} x {states:.3g}", f"trainer.optim={optim}")
    if step.processes > 1:  # DDP copies gradients into buckets
        memory.add("DDP buckets", trained * width, "always", f"{trained:,} x {width}", "torch DistributedDataParallel")


def _add_activations(memory: Memory, step: Step, base: Sizes) -> None:
    """Add what the forward pass keeps, layer by layer, and what the backward and the loss need beside it."""
    layers, tokens, kwargs, text = base.layers, step.tokens, step.checkpointing, base.text
    shape = sizes(text)
    autocast = step.precision != "float32" and not step.deepspeed  # accelerate: DeepSpeed casts the model itself
    dtype = step.precision if step.quantization else step.weights
    adapter = step.precision if step.deepspeed or step.quantization else "float32"  # TRL: of a quantized base 16 bits
    peft = dict(step.peft) if step.peft else None
    saved = saved_per_token(
        text, peft=peft, base_dtype=dtype, adapter_dtype=adapter, autocast=autocast,
        selective=bool(kwargs and kwargs.get("selective")), row_tokens=tokens // step.rows,
        attention=step.attention, liger=step.trainer.get("use_liger_kernel") is True,
    )  # fmt: skip
    memory.exact = memory.exact and saved.exact
    source = saved.source
    again = 0  # layers whose inputs alone are kept
    if kwargs is not None and not kwargs.get("selective"):
        again = -(-layers // int(kwargs.get("every_n_layers") or 1))
        width = DTYPE_BYTES[dtype] * shape["h"] * (not kwargs.get("offload"))
        formula = f"{tokens:,} tokens x {again} layers x {width:,} bytes"
        memory.add("layer inputs", tokens * again * width, "forward", formula, "torch.utils.checkpoint")
    kept = layers - again
    if kept:
        size = kept * (tokens * saved.bytes_per_token_layer + saved.bytes_per_layer)
        memory.add("activations", size, "forward", f"{tokens:,} tokens x {kept} layers x ({saved.formula})", source)
        casts = saved.copies_per_parameter * base.trained * kept / layers
        formula = f"{base.trained:,} x {saved.copies_per_parameter}"
        memory.add("weights, cast", casts, "forward", formula, "torch autocast")
    beside = f"{tokens:,} tokens x {saved.outside_per_token:,} bytes"
    memory.add("embedding, norm", tokens * saved.outside_per_token, "forward", beside, source)
    if (step.quantization or {}).get("load_in_8bit"):
        # MatMul8bitLt leaves it on the module's state, which checkpointing does not free: 33.2 GiB on an H100 where
        # the same run with nf4 took 9.5.
        formula, source8 = f"{tokens:,} tokens x {base.inputs:,} x 2", "bitsandbytes autograd/_functions.py"
        memory.add("inputs of int8 matmuls", 2 * tokens * base.inputs, "forward", formula, source8)
    if kwargs is not None:
        formula = f"{tokens:,} tokens x {saved.recomputed_per_token:,} bytes"
        size = tokens * saved.recomputed_per_token
        memory.add("one layer, computed again", size, "backward", formula, source)
    per_token = DTYPE_BYTES[step.precision] * (3 * shape["i"] + 2 * shape["h"])
    formula = f"{tokens:,} tokens x {per_token:,} bytes: three of the MLP's width, two of the hidden size"
    memory.add("gradients of activations", tokens * per_token, "backward", formula, "torch autograd")
    trains_head = step.peft is None or bool(step.peft.get("modules_to_save"))
    size, source = head_bytes(
        text, tokens, trains_head=trains_head, base_dtype=dtype, autocast=autocast,
        fused=not step.trainer.get("label_smoothing_factor"), triton=not step.trainer.get("use_cpu"),
    )  # fmt: skip
    memory.add("head and loss", size, "loss", f"{tokens:,} tokens, vocabulary {text.get('vocab_size', 0):,}", source)


def _add_zero_buffers(memory: Memory, step: Step, base: Sizes) -> None:
    """Add DeepSpeed's buckets, and what ZeRO-3 gathers.

    The embedding and the head stay whole from their first use in a step to their last; the last layers of the forward
    pass, `stage3_max_reuse_distance` parameters, stay for the backward.
    """
    if not step.stage:
        return
    zero, width = (step.deepspeed or {}).get("zero_optimization") or {}, DTYPE_BYTES[step.precision]
    hidden = sizes(base.text)["h"]
    bucket = zero.get("reduce_bucket_size", 5e8)
    bucket = min(hidden * hidden if bucket == "auto" else bucket, base.trained)
    copies = 2 if zero.get("overlap_comm") else 1
    formula = f"{bucket:,.0f} x {width} x {copies}"
    memory.add("reduce buckets", bucket * width * copies, "backward", formula, "DeepSpeed stage_1_and_2.py, stage3.py")
    memory.terms += gathered_terms(step, base)


def gathered_terms(step: Step, base: Sizes) -> list[Term]:
    """Return the terms of what ZeRO-3 gathers."""
    if step.stage < 3 or step.processes == 1 and not step.offloads("param"):
        return []
    zero, width = (step.deepspeed or {}).get("zero_optimization") or {}, DTYPE_BYTES[step.precision]
    in_layer = 0.6 if step.quantization else width  # bytes of a quantized weight, its scales included
    source, layer = "DeepSpeed partitioned_param_coordinator.py", base.largest_layer
    prefetched = zero.get("stage3_prefetch_bucket_size", 0)
    if not zero.get("leaf_module") and (prefetched == "auto" or prefetched < layer):
        # Module by module: two decoder layers' worth, and the head where it is used.
        return [
            Term("gathered layers", 2 * layer * in_layer, "always", f"2 layers of {layer:,} parameters", source),
            Term("gathered head", base.largest_end * width, "loss", f"{base.largest_end:,} x {width}", source),
        ]
    reuse = zero.get("stage3_max_reuse_distance")
    kept = math.ceil((reuse if isinstance(reuse, int | float) else DISTANCE) / layer)
    count = min(base.layers, kept + 2)
    formula = f"{count} layers of {layer:,} parameters"
    return [
        Term("gathered layers", count * layer * in_layer, "forward", formula, source),
        Term("gathered ends", base.ends * width, "forward", f"{base.ends:,} x {width}", source),
    ]
