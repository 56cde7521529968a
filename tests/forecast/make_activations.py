"""Write kit/forecast/activations.json by measurement: `python tests/forecast/make_activations.py`.

Each model is run forward on fake tensors of the device "cuda": no memory, no GPU, but the dispatcher's own choices of
a GPU, whose autocast rules and fused dropout differ from a CPU's. saved_tensors_hooks count the storages that autograd
keeps, parameters and buffers left out. Bytes are linear in tokens and in each size of the model, so a few shapes give
integer coefficients; two further shapes must agree to the byte.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import itertools
import json
import pathlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from tiny_architectures import model_of  # noqa: E402

from kit.forecast.activations import TABLE, evaluate, sizes  # noqa: E402
from kit.inspection.attention import ATTENTION, FLEX, choose_attention  # noqa: E402
from kit.inspection.trainable import parameter_table  # noqa: E402

TOKENS = 2**24  # larger than any count of bytes per token, so that bytes = T^2 a + T b + c reads as digits
LAYERS = (
    3  # the first is special, nothing before it is trained, and the second may be the first to keep the rotary sizes
)
BF16, F32 = torch.bfloat16, torch.float32
# What is measured: (base's dtype, adapter's dtype or None for full fine-tuning, whether autocast to bfloat16 is on).
VARIANTS = {
    "lora float32 autocast": (BF16, F32, True),
    "lora bfloat16": (BF16, BF16, False),
    "lora bfloat16 autocast": (BF16, BF16, True),
    "lora float32": (F32, F32, False),
    "full bfloat16": (BF16, None, False),
    "full bfloat16 autocast": (BF16, None, True),
    "full float32 autocast": (F32, None, True),
    "full float32": (F32, None, False),
}
CAST = "lora float32 autocast, inputs cast"  # PEFT as it comes: for comparison, of one family
VARIANTS[CAST] = VARIANTS["lora float32 autocast"]
GEMMA = {"query_pre_attn_scalar": 8}
# model type: (symbols of its formula, settings that real models have and the class's defaults lack)
OWN_HEADS = ("h", "i", "q", "kv", "H", "G")  # head_dim is free
TIED = ("h", "i", "kv", "H", "G")  # q is h
PLAIN = ("h", "i", "H")  # q and kv are h
SPARSE = ("h", "k_h", "k_m", "q", "kv", "H", "G", "E", "k")
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": (OWN_HEADS, {}), "mistral": (OWN_HEADS, {}), "qwen2": (TIED, {}), "qwen3": (OWN_HEADS, {}),
    "gemma": (OWN_HEADS, {}), "gemma2": (OWN_HEADS, GEMMA), "gemma3_text": (OWN_HEADS, GEMMA), "phi3": (TIED, {}),
    "phi": (TIED, {}), "gpt2": (PLAIN, {}), "gpt_neox": (PLAIN, {}), "falcon": (("h", "i", "kv", "H"), {}),
    "olmo2": (TIED, {}), "granite": (TIED, {}), "smollm3": (TIED, {}), "cohere": (TIED, {}), "starcoder2": (TIED, {}),
    "stablelm": (TIED, {}), "mixtral": (SPARSE, {}), "qwen3_moe": (SPARSE, {"norm_topk_prob": True}),
    "qwen2_moe": ((*SPARSE, "s"), {}),
    "deepseek_v3": (
        ("h", "k_h", "k_m", "q", "H", "E", "k", "s", "A", "C", "R", "n", "v"), {"first_k_dense_replace": 0}
    ),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")  # PEFT finds the parameters of their experts
# Keys of config.json that change what is kept: a model that sets one otherwise than was measured is not exact.
SWITCHES = (
    "hidden_act", "hidden_activation", "activation_function", "activation", "norm_topk_prob", "qk_layernorm",
    "use_qk_norm", "parallel_attn", "new_decoder_architecture", "multi_query", "use_parallel_residual", "alibi",
    "attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "residual_dropout", "attn_logit_softcapping",
    "num_ln_in_parallel_attn", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers",
    "router_jitter_noise",
)  # fmt: skip


def install_cuda_guard() -> None:
    """Give a CPU build of torch a device guard for "cuda" that does nothing: meta's, which takes every call.

    FakeTensorMode does so where CUDA is compiled in and no device is there (c10, ensureCUDADeviceGuardSet).
    """
    lib = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(lib, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    if not guards[cuda]:
        guards[cuda] = guards[meta]


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What scaled_dot_product_attention is on a GPU in bfloat16, whose kernel a CPU build cannot choose."""
    assert attn_mask is None
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (states.to(BF16) for states in (query, key, value))
    aten = torch.ops.aten
    if query.shape[-1] != value.shape[-1]:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True, dropout_p, is_causal)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def gpu(device: str, autocast: bool) -> Iterator[None]:
    """Run what follows as on a GPU (device "cuda") or CPU, rows full: their attention needs no mask."""
    from transformers import AttentionMaskInterface

    from kit.models import attention

    attention.register()
    masks = AttentionMaskInterface()
    none = {name: lambda *args, **settings: None for name in (ATTENTION, "sdpa", "eager")}
    on_gpu = [
        mock.patch.object(attention, "capability", lambda device: attention.HOPPER),
        mock.patch("torch.cuda.get_device_capability", lambda device: attention.HOPPER),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(masks._global_mapping, none))
        for patch in on_gpu if device == "cuda" else []:
            stack.enter_context(patch)
        # torch.autocast("cuda") turns itself off where no GPU is
        torch.set_autocast_enabled(device, autocast)
        torch.set_autocast_dtype(device, BF16)
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device, False)


@dataclass
class Measured:
    """Bytes that autograd keeps: of a decoder layer, and beside the layers (negative: what the first layer lacks)."""

    squared: int  # per token and token of its row
    token: int  # per token
    layer: int  # per layer alone: copies of weights
    outside_token: int
    outside: int
    matrices: int  # trained parameters of a layer that are matrices


def make_model(
    kind: str, config: dict[str, Any], variant: str, targets: Any, dropout: float, rank: int, device: str = "meta"
) -> Any:
    """A causal model in training, with a LoRA adapter where the variant has one."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    from kit.models import attention

    attention.register()
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(kind, attention_of(kind), **config)
        if VARIANTS[variant][1] is not None:
            lora = LoraConfig(r=rank, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = variant == CAST  # else off, as the kit trains under autocast
    return model.train()


def attention_of(kind: str) -> str:
    """The attention that the kit, else transformers, chooses; eager in FlexAttention's place, which needs a GPU."""
    chosen = choose_attention({"model_type": kind}, {}, None)
    return {None: "sdpa", FLEX: "eager"}.get(chosen, chosen)


def measure(model: Any, variant: str) -> Measured:
    """Run a model of `make_model` forward on TOKENS fake tokens and count what is kept. AssertionError where layers
    differ from each other.
    """
    base, adapter, autocast = VARIANTS[variant]
    device = "cpu" if base is F32 and not autocast else "cuda"  # a GPU in float32 is not for training
    depth = model.config.num_hidden_layers
    backbone = (model.get_base_model() if adapter is not None else model).base_model
    layers = next(m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth)
    kept: dict[int, torch.UntypedStorage] = {}
    marks: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def count(*_: Any) -> None:
        marks.append(sum(s.nbytes() for key, s in kept.items() if key not in own))

    install_cuda_guard()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    dtype = base if adapter is None or not p.requires_grad else adapter
                    fake = torch.empty(p.shape, dtype=dtype, device=device)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
        own = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
        hooks = [layer.register_forward_pre_hook(count) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(count))
        ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
        with gpu(device, autocast), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = backbone(input_ids=ids, use_cache=False)
        count()
        for hook in hooks:
            hook.remove()
    del output
    steps = {end - begin for begin, end in zip(marks[2:-2], marks[3:-1], strict=True)}
    assert len(steps) == 1, f"layers differ: {steps}"
    layer, total = digits(steps.pop()), digits(marks[-1])
    outside = [whole - depth * part for whole, part in zip(total, layer, strict=True)]
    matrices = [p for p in layers[1].parameters() if p.requires_grad and p.dim() > 1]
    return Measured(*layer, *outside[1:], sum(p.numel() for p in matrices))


def digits(total: int) -> tuple[int, int, int]:
    """Bytes per token and token of its row, per token, and beside them."""
    return total // TOKENS**2, total // TOKENS % TOKENS, total % TOKENS


def shape(kind: str, at: int) -> tuple[dict[str, Any], int]:
    """The `at`th of a family's shapes, no two sizes in proportion, as a config and a LoRA rank."""
    import random

    draw = random.Random(f"{at} {kind}")
    groups = draw.choice([2, 3, 4])  # of one group, eager attention's repeat_kv makes no copy
    heads, head = groups * draw.choice([2, 3]), 8 * draw.choice([1, 2, 3, 4])
    experts = draw.choice([4, 6, 8])
    config = {
        "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": head,
        "hidden_size": 8 * heads * draw.randint(1, 5), "intermediate_size": 8 * draw.randint(3, 20),
        "moe_intermediate_size": 8 * draw.randint(3, 12), "num_experts": experts, "num_local_experts": experts,
        "num_experts_per_tok": draw.choice([1, 2, 3]), "shared_expert_intermediate_size": 8 * draw.randint(3, 12),
        "sliding_window": 2 * TOKENS, "max_position_embeddings": 128,
    }  # fmt: skip
    symbols = FAMILIES[kind][0]
    if kind == "deepseek_v3":
        rotary = 8 * draw.randint(1, 4)  # values are never as wide as queries: another kernel takes them
        config |= {"head_dim": rotary, "q_lora_rank": 8 * draw.randint(1, 9), "kv_lora_rank": 8 * draw.randint(1, 9),
                   "qk_rope_head_dim": rotary, "qk_nope_head_dim": 8 * draw.randint(1, 4),
                   "v_head_dim": 8 * draw.randint(9, 12), "n_routed_experts": experts, "n_group": 2, "topk_group": 2,
                   "n_shared_experts": draw.choice([1, 2, 3]), "num_key_value_heads": heads}  # fmt: skip
    elif "q" not in symbols:
        config["hidden_size"] = heads * head
    if kind == "mixtral":
        config["intermediate_size"] = config["moe_intermediate_size"]
    if kind == "gpt2":
        config |= {"n_embd": heads * head, "n_head": heads, "n_layer": LAYERS, "n_inner": config["intermediate_size"]}
    if kind == "falcon":
        del config["head_dim"]
        config |= {"ffn_hidden_size": config["intermediate_size"]}
    return {**config, **FAMILIES[kind][1]}, 4 * draw.randint(1, 8)


def linears_of(kind: str) -> dict[str, list[str]]:
    """Names of the linear layers of a decoder layer, by the set of targets that holds them, the smallest set first.

    experts: what PEFT makes of "all-linear" where it knows the experts' parameters.
    """
    names = list(find_linears(make_model(kind, shape(kind, 0)[0], "full bfloat16", [], 0.0, 1)))
    experts = parameter_table()["moe"]["mixtral" if kind == "mixtral" else "qwen2_moe"]["targets"]
    if kind in MIXTURES:  # a shared expert's layers have names that PEFT takes for those of all experts
        names = [name for name in names if name.split(".")[-1] not in experts]
    attention = [name for name in names if "attn" in name or "attention" in name]
    leaf = {n: ".".join(n.split(".")[-2:]) if kind == "gpt2" else n.split(".")[-1] for n in names}
    qv = [n for n in attention if "q" in leaf[n].split("_")[0] or leaf[n].startswith(("v_", "attn.c_attn", "kv_"))]
    sets = {"qv": qv, "attention": attention, "mlp": [n for n in names if n not in attention], "all": names}
    found = {key: sorted({leaf[n] for n in members}) for key, members in sets.items() if members}
    found = {k: v for k, v in found.items() if k == "all" or v != found["all"]}
    return {**found, "experts": [*found["all"], *experts]} if kind in MIXTURES else found


def find_linears(model: Any) -> dict[str, int]:
    """Names of the linear layers in a decoder layer, and how wide their results are."""
    from transformers.pytorch_utils import Conv1D

    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS)
    return {name: module.nf if isinstance(module, Conv1D) else module.out_features
            for name, module in layers[1].named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))}  # fmt: skip


def outputs_of(kind: str) -> str:
    """How wide the results of all linear layers of a decoder layer are, as a formula of numbers per token."""
    symbols = [*FAMILIES[kind][0], "1"]
    shapes = choose_shapes(kind, symbols)
    models = [make_model(kind, shape(kind, at)[0], "full bfloat16", [], 0.0, 1) for at in shapes]
    values = [sum(find_linears(model).values()) for model in models]
    return fit(symbols, [sizes(model.config.to_dict()) for model in models], values)


def choose_shapes(kind: str, symbols: list[str]) -> list[int]:
    """Shapes whose sizes leave one solution for the symbols, and two more, which must agree with it."""
    from transformers import AutoConfig

    chosen: list[int] = []
    rows: list[list[int]] = []
    for at in itertools.count():
        config, rank = shape(kind, at)
        point = {**sizes(AutoConfig.for_model(kind, **config).to_dict()), "r": rank, "P": at * at + 1}
        row = [product(symbol, point) for symbol in symbols]
        if len(chosen) >= len(symbols) or rank_of([*rows, row]) > len(rows):
            chosen.append(at)
            rows.append(row)
        if len(chosen) == len(symbols) + 2:
            return chosen
    raise AssertionError


def rank_of(rows: list[list[int]]) -> int:
    return int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64)))


def solve(rows: list[list[int]], values: list[int]) -> list[Fraction] | None:
    """The one solution of linear equations, exactly; None where there is none or more than one."""
    table = [[*map(Fraction, row), Fraction(value)] for row, value in zip(rows, values, strict=True)]
    width = len(rows[0])
    for column in range(width):
        pivot = next((i for i in range(column, len(table)) if table[i][column]), None)
        if pivot is None:
            return None
        table[column], table[pivot] = table[pivot], table[column]
        table[column] = [x / table[column][column] for x in table[column]]
        for i, row in enumerate(table):
            if i != column and row[column]:
                table[i] = [a - row[column] * b for a, b in zip(row, table[column], strict=True)]
    return [row[-1] for row in table[:width]] if not any(any(row) for row in table[width:]) else None


def fit(symbols: list[str], points: list[dict[str, int]], values: list[int]) -> str:
    """The formula that gives all values; ValueError where none with integers does."""
    rows = [[product(symbol, point) for symbol in symbols] for point in points]
    found = solve(rows, values)
    if found is None or any(x.denominator != 1 for x in found):
        raise ValueError(f"not linear in {symbols}: {found and [str(x) for x in found]} ")
    terms = [f"{int(x):+d}{'' if s == '1' else s}" for x, s in zip(found, symbols, strict=True) if x]
    return "".join(terms).lstrip("+") or "0"


def product(symbol: str, point: dict[str, int]) -> int:
    result = 1
    for part in symbol.split("_"):
        result *= 1 if part == "1" else point[part]
    return result


def rows_of(kind: str, known: list[list[str]], only: str = "") -> dict[str, list[str]]:
    """The rows of a family by variant, dropout and targets. known: rows that were found before, tried first."""
    targets, rows = linears_of(kind), {}
    for variant, name, dropout in itertools.product(VARIANTS, targets, (0.0, 0.1)):
        lora, fine = VARIANTS[variant][1] is not None, name == "all"
        key = f"{variant}{f' {name}' if lora else ''}{' dropout' if dropout else ''}"
        if (variant == CAST and kind != "llama") or (variant in ("lora float32", CAST) and not fine):
            continue
        if only not in key or (not lora and (dropout or not fine)) or (name == "experts" and dropout):
            continue  # PEFT has no dropout on parameters
        if VARIANTS[variant][0] is F32 and "E" in FAMILIES[kind][0]:
            continue  # the fake kernel of grouped_mm takes bfloat16 alone
        wanted = "all-linear" if name == "experts" else targets[name]
        rows[key] = measure_row(kind, variant, dropout, wanted, known)
    return rows


def measure_row(kind: str, variant: str, dropout: float, names: Any, known: list[list[str]]) -> list[str]:
    """[per token, per token and token of its row, per token beside the layers, per layer alone], as formulas.

    A known row that gives the bytes of two shapes is the row; else it is solved for.
    """
    symbols = [*FAMILIES[kind][0], *(["r"] if "lora" in variant else []), "1"]
    outside = [*symbols[:-1], "D", "1"]
    weights = ["P", "D", *(s for s in symbols if s != "r"), *(["E_h", "E_m_h"] if "E" in symbols else [])]
    points: list[dict[str, int]] = []
    found: list[list[int]] = []
    for at in choose_shapes(kind, max(outside, weights, key=len)):
        config, rank = shape(kind, at)
        model = make_model(kind, config, variant, names, dropout, rank)
        text = (model.get_base_model() if "lora" in variant else model).config.to_dict()
        result = measure(model, variant)
        points.append({**sizes(text), "r": rank, "P": result.matrices})
        found.append([result.token, result.squared, result.outside_token, result.layer])
        if len(found) == 2:
            for row in known:
                if all(evaluate(row[i], p) == f[i] for p, f in zip(points, found, strict=True) for i in range(4)):
                    return row
    columns = [list(column) for column in zip(*found, strict=True)]
    row = [fit(s, points, c) for s, c in zip((symbols, ["H", "1"], outside, weights), columns, strict=True)]
    known.append(row)
    return row


def switches_of(kind: str) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **FAMILIES[kind][1]).to_dict()
    return {key: config[key] for key in SWITCHES if config.get(key) is not None}


def build_family(kind: str, known: list[list[str]]) -> dict[str, Any]:
    """One family's entry of the table. known: the rows of llama, so that equal families are given equal formulas."""
    rows = rows_of(kind, list(known))
    print(kind, flush=True)
    return {"types": {kind: switches_of(kind)}, "targets": linears_of(kind), "outputs": outputs_of(kind), "rows": rows}


def build() -> dict[str, Any]:
    import peft
    import transformers

    torch.set_num_threads(1)
    first = build_family("llama", [])
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(build_family, k, list(first["rows"].values())) for k in FAMILIES if k != "llama"]
        families = [first, *(job.result() for job in jobs)]
    groups: list[dict[str, Any]] = []
    for family in families:
        same = next((group for group in groups if facts_of(group) == facts_of(family)), None)
        if same is None:
            groups.append(family)
        else:
            same["types"] |= family["types"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    return {"generated_from": versions, "groups": groups}


def facts_of(group: dict[str, Any]) -> list[Any]:
    """What the families of a group have in common."""
    rows = {key: row for key, row in group["rows"].items() if not key.startswith(CAST)}
    return [group["targets"], group["outputs"], rows]


def dump(data: dict[str, Any]) -> str:
    """JSON with one row of the table to a line."""

    def lines(value: dict[str, Any]) -> str:
        return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"

    groups = [", ".join(f'"{k}": {lines(v) if k == "rows" else json.dumps(v)}' for k, v in g.items())
              for g in data["groups"]]  # fmt: skip
    return (
        f'{{"generated_from": {json.dumps(data["generated_from"])},\n"groups": [\n{{' + "},\n{".join(groups) + "}]}\n"
    )


if __name__ == "__main__":
    text = dump(build())
    TABLE.write_text(text)
    print(f"{TABLE.name}: {len(text)} bytes")
