"""Attention for training: full rows, packed documents and sliding windows, each by the fastest exact kernel there is.

transformers calls it by the names ATTENTION and FLEX, once `register()` has been called. A batch whose documents are
packed into one row needs no mask of the row's length squared: the collator's `cu_seq_lens_q` say where each begins.
FLEX is for models that sdpa cannot compute (capped logits, sinks): torch's FlexAttention on GPUs, elsewhere their own
eager attention, document by document.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from kit.inspection.attention import ATTENTION, FLEX, WITHOUT_FLEX

# For full rows cuDNN is 1.8x as fast as flash attention on Hopper; torch passes on to the next what one refuses.
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HOPPER, AMPERE = (9, 0), (8, 0)
FLEX_BLOCK, UNCOMPILED_TOKENS = 128, 256
# The last batch's, with and without a window: the collator's lengths, the window, the mask.
PACKED: collections.deque[tuple[weakref.ref[torch.Tensor], int | None, BlockMask]] = collections.deque(maxlen=2)
VARLEN_HEAD_SIZE = 256  # flash attention's largest
FLASH_INT32 = 2**31  # flash attention counts elements in 32 bits: (tokens + 128 documents) x heads x head size


def register() -> None:
    """Make ATTENTION and FLEX known to transformers, as attention and as mask."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, make_mask)
    AttentionInterface.register(FLEX, flex_forward)
    AttentionMaskInterface.register(FLEX, make_flex_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    dense_mask: Callable[..., Any] = sdpa_mask,
    **settings: Any,
) -> torch.Tensor | None:
    """Return the mask of a layer as `attention_forward` and `flex_forward` read it.

    None: causal rows without padding; a sliding window comes with the layer. An int32 tensor [B, 1, 1, T]: packed
    documents, numbered from 0 in each row. Else what `dense_mask` of transformers makes, [B, 1, T, S].
    """
    square = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length > 1
    padded = attention_mask is not None and not bool(attention_mask.all())
    chunked = getattr(config, "attention_chunk_size", None)  # its layers do not say their chunk
    if square and not padded and not use_vmap and not chunked:
        if allow_is_causal_skip:
            return None
        documents = number_documents(mask_function, batch_size, q_length, device)
        if documents is not None:
            return documents
    return dense_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **settings,
    )


def make_flex_mask(**given: Any) -> Any:
    """Return FlexAttention's BlockMask of causal rows, windows, padding and packed documents.

    given: the arguments of `make_mask`, which is called where FlexAttention is not used, before a cache, and for masks
    of another kind.
    """
    tokens, device, offset = given["q_length"], torch.device(given.get("device", "cpu")), given.get("q_offset", 0)
    square = isinstance(offset, int) and offset == 0 and tokens == given["kv_length"] > 1
    if square and not given.get("use_vmap") and takes_flex(device, given.get("config")):
        seen, window = given.get("attention_mask"), given.get("local_size")
        padded = seen is not None and not bool(seen.all())
        if not padded and given.get("allow_is_causal_skip", True):
            return causal_blocks(tokens, window, device)
        function = given.get("mask_function", causal_mask_function)
        documents = number_documents(function, given["batch_size"], tokens, device)
        if documents is not None:
            documents = documents[:, 0, 0]
            if seen is not None and padded:
                documents = documents.masked_fill(~seen.bool(), -1)
            return make_blocks(tokens, window, documents, device)
    return make_mask(**given, dense_mask=eager_mask)


def make_blocks(tokens: int, window: int | None, documents: torch.Tensor | None, device: torch.device) -> BlockMask:
    """Return the BlockMask of causal rows; documents: their numbers, int32 [B, T].

    Rows are lengthened to a power of two, with tokens that see themselves alone: FlexAttention is compiled anew for
    each length, and with lengths left open torch 2.11 fails to compile it. Blocks that nobody sees cost no time.
    """
    size = max(FLEX_BLOCK, 1 << (tokens - 1).bit_length())
    lengthened = size > tokens
    places = torch.arange(size, dtype=torch.int32, device=device)
    added = (places - tokens + 1).clamp(min=0)  # 0 for the rows' own tokens, another number for each further one
    if documents is not None:
        documents = torch.nn.functional.pad(documents, (0, size - tokens))

    def visible(row: torch.Tensor, head: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        seen = here >= there
        if window is not None:
            seen = seen & (here - there < window)
        if lengthened:
            seen = seen & (added[here] == added[there])
        if documents is not None:
            seen = seen & (documents[row, here] == documents[row, there])
        return seen

    rows = None if documents is None else documents.shape[0]
    return create_block_mask(visible, rows, None, size, size, device=device, BLOCK_SIZE=FLEX_BLOCK)


@functools.lru_cache(8)
def causal_blocks(tokens: int, window: int | None, device: torch.device) -> BlockMask:
    return make_blocks(tokens, window, None, device)


def packed_blocks(query: torch.Tensor, cu_seq_lens: torch.Tensor, window: int | None) -> BlockMask:
    """Return the BlockMask of the collator's documents, made once for all layers of a batch."""
    for ends, width, mask in PACKED:
        if ends() is cu_seq_lens and width == window:
            return mask
    rows, tokens = query.shape[0], query.shape[2]
    places = torch.arange(rows * tokens, device=query.device, dtype=torch.int32)
    documents = torch.bucketize(places, cu_seq_lens[1:].to(torch.int32), right=True, out_int32=True)
    mask = make_blocks(tokens, window, documents.view(rows, tokens), query.device)
    PACKED.appendleft((weakref.ref(cu_seq_lens), window, mask))
    return mask


def takes_flex(device: torch.device, config: Any) -> bool:
    """Whether torch's FlexAttention computes a model on this device."""
    return (
        device.type == "cuda"
        and capability(device) >= AMPERE
        and getattr(config, "attention_dropout", 0.0) in (None, 0.0)
        and getattr(config, "model_type", None) not in WITHOUT_FLEX
        and importlib.util.find_spec("triton") is not None
    )


def number_documents(mask_function: Callable[..., torch.Tensor], rows: int, tokens: int, device: Any) -> Any:
    """Number the documents of each row from what a causal mask lets each token see; None for another mask.

    A token that does not see the one before it begins a document; one that sees the next is in no causal mask.
    """
    here = torch.arange(tokens - 1, device=device)[None, None, :]
    row, head = torch.arange(rows, device=device)[:, None, None], torch.zeros(1, 1, 1, dtype=torch.long, device=device)
    if bool(mask_function(row, head, here, here + 1).any()):
        return None
    begins = ~mask_function(row, head, here + 1, here)
    documents = torch.zeros(rows, 1, 1, tokens, dtype=torch.int32, device=device)
    documents[..., 1:] = begins.expand(rows, 1, tokens - 1)[:, :, None].cumsum(-1)
    return documents


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, as transformers' AttentionInterface asks: q [B, H, T, D], k and v [B, G, S, D] to [B, T, H, D].

    attention_mask: as `make_mask` made it. ValueError for what no kernel here computes.
    """
    for name in ("softcap", "s_aux"):
        if settings.get(name) is not None:
            raise ValueError(f"attn_implementation={ATTENTION} has no {name}: use flex_attention or eager")
    documents = find_documents(module, query, key, attention_mask, is_causal, cu_seq_lens_q, max_length_q)
    tokens = query.shape[2]
    if documents is None and attention_mask is None and sliding_window is not None and sliding_window < tokens:
        if is_causal_and_square(module, query, key, is_causal):
            documents = boundaries(query, None)
    if documents is None:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True) if prefers_cudnn(query) else contextlib.nullcontext():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **settings
            )
    if settings.get("position_bias") is not None:
        raise ValueError(f"attn_implementation={ATTENTION} packs attention without a position bias alone")
    ends, longest = documents
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    if takes_varlen(query, value, ends) and dropout == 0.0:
        output = varlen_documents(q, k, v, ends, longest, scaling, window)
    elif takes_varlen(query, value, ends):
        output = documents_with_dropout(q, k, v, ends, longest, scaling, window, dropout)
    else:
        output = loop_over_documents(q, k, v, ends, scaling, window, dropout)
    return output.unflatten(0, (query.shape[0], tokens)), None


def flex_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by FlexAttention where the mask is its own, else by the model's own eager attention within each document.

    Shapes: `attention_forward`.
    """
    if isinstance(attention_mask, BlockMask):
        if cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2:  # some make the mask without positions
            attention_mask = packed_blocks(query, cu_seq_lens_q, sliding_window)
        named = {name: settings.get(name) for name in ("scaling", "softcap", "s_aux")}
        return attend_by_blocks(query, key, value, attention_mask, **named).transpose(1, 2).contiguous(), None
    own = sys.modules[type(module).__module__].eager_attention_forward
    documents = find_documents(module, query, key, attention_mask, is_causal, cu_seq_lens_q, max_length_q)
    if documents is None:
        if attention_mask is None and query.shape[2] == key.shape[2]:
            attention_mask = causal_bias(query, sliding_window)
        output, weights = own(module, query, key, value, attention_mask, sliding_window=sliding_window, **settings)
        return output, weights
    rows, tokens = query.shape[0], query.shape[2]
    # All rows after each other, as one: [1, H, B T, D].
    flat = [s.transpose(0, 1).flatten(1, 2)[None] for s in (query, key, value)]
    outputs = []
    for q, k, v in zip(*(s.split(documents[0].diff().tolist(), dim=2) for s in flat), strict=True):
        bias = causal_bias(q, sliding_window)
        outputs.append(own(module, q, k, v, bias, sliding_window=sliding_window, **settings)[0])
    return torch.cat(outputs, dim=1)[0].unflatten(0, (rows, tokens)), None


def attend_by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend by FlexAttention: q [B, H, T, D], k and v [B, G, T, D] to [B, H, T, D]. s_aux: a sink for each head, [H].

    A sink takes its share of each softmax and adds nothing, so that an output shrinks by sigmoid(lse - sink). This is
    done in float32: transformers rounds lse to the values' dtype first, 3 % of a weight at lse 8 in bfloat16.
    """
    tokens, size = query.shape[2], mask.shape[-1]
    if size > tokens:
        query, key, value = (torch.nn.functional.pad(s, (0, 0, 0, size - tokens)) for s in (query, key, value))
    # A compilation takes longer than short rows do: their scores are written out.
    attend = compile_flex(tokens > UNCOMPILED_TOKENS)
    output, aux = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap_scores(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if s_aux is not None:
        share = torch.sigmoid(aux.lse - s_aux.float()[:, None])
        output = output * share[..., None].to(output.dtype)
    return output[:, :, :tokens]


@functools.cache
def compile_flex(compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # lengths x masks
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def cap_scores(softcap: float) -> Callable[..., torch.Tensor]:
    """FlexAttention's change of scores by a softcap; the same function each time, so that nothing is compiled anew."""

    def score_mod(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def causal_bias(query: torch.Tensor, window: int | None) -> torch.Tensor:
    """What eager attention adds to its scores, [1, 1, T, T]: 0 where a token sees, the smallest number elsewhere."""
    seen = causal_window(query.shape[2], window, query.device)
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    return bias.masked_fill_(~seen, torch.finfo(query.dtype).min)[None, None]


def causal_window(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which tokens each sees of those up to it, bool [T, T]: all, or the last `window`, itself counted."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def find_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    cu_seq_lens_q: torch.Tensor | None,
    max_length_q: int | None,
) -> tuple[torch.Tensor, int] | None:
    """Where packed documents begin and end, int32 [documents + 1], and the longest one's tokens; None: not packed.

    From the collator, else from a numbering mask. ValueError for what cannot be packed.
    """
    numbered = attention_mask is not None and attention_mask.dtype == torch.int32
    packed = cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2
    if packed and attention_mask is not None and not numbered:
        raise ValueError("a batch holds padded rows or packed documents, not both: one mask cannot say it")
    if not (numbered or packed):
        return None
    if not is_causal_and_square(module, query, key, is_causal):
        raise ValueError("only causal self-attention without a cache can be packed")
    if not packed or cu_seq_lens_q is None:
        return boundaries(query, attention_mask)
    return cu_seq_lens_q, max_length_q if max_length_q is not None else int(cu_seq_lens_q.diff().max())


def is_causal_and_square(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, given: bool | None) -> bool:
    """Whether each token sees those up to it, and no cache stands in front. given: the caller's word on causality."""
    causal = given if given is not None else getattr(module, "is_causal", True)
    return bool(causal) and query.shape[2] == key.shape[2]


def boundaries(query: torch.Tensor, documents: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Where documents begin and end in the flattened rows, int32 [documents + 1], and the longest one's tokens.

    For models that do not hand on the collator's cu_seq_lens_q, and for whole rows (documents None).
    """
    rows, tokens = query.shape[0], query.shape[2]
    if documents is None:
        return torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=query.device), tokens
    in_rows = documents.reshape(-1, tokens).expand(rows, tokens)
    begins = torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
    begins[:, 1:] = in_rows[:, 1:] != in_rows[:, :-1]
    starts = begins.flatten().nonzero().flatten().to(torch.int32)
    ends = torch.cat([starts, starts.new_full((1,), rows * tokens)])
    return ends, int(ends.diff().max())


def describe_attention(name: str, device: torch.device, dtype: torch.dtype, config: Any = None) -> str:
    """Say which kernels compute what, for a run's first lines."""
    if name == FLEX:
        flex, eager = "torch's FlexAttention", "the model's own eager attention, packed documents one after another"
        return f"{name}: {flex if takes_flex(device, config) else eager}"
    if name != ATTENTION:
        return name
    query = torch.empty(1, 1, 1, 8, dtype=dtype, device=device)
    rows = "cuDNN, else flash attention" if prefers_cudnn(query) else "torch's choice"
    ends = torch.zeros(2, dtype=torch.int32)
    documents = "varlen_attn" if takes_varlen(query, query, ends) else "sdpa, one after another"
    return f"{name}: full rows by {rows}, packed documents by {documents}"


def prefers_cudnn(query: torch.Tensor) -> bool:
    """Whether this device computes full rows fastest by cuDNN."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and capability(query.device) >= HOPPER


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def takes_varlen(query: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor) -> bool:
    """Whether flash attention computes these documents: torch's `varlen_attn`, or its operator with dropout."""
    heads, size = query.shape[1], query.shape[3]
    elements = (query.shape[0] * query.shape[2] + 128 * cu_seq_lens.numel()) * heads * size
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and capability(query.device) >= AMPERE
        and size == value.shape[3] <= VARLEN_HEAD_SIZE
        and size % 8 == 0
        and elements < FLASH_INT32
        and varlen_arguments() is not None
    )


@functools.cache
def varlen_arguments() -> dict[str, Any] | None:
    """What this torch's `varlen_attn` needs to take fewer key than query heads; None where torch has none (< 2.10).

    Before torch 2.12 grouped heads need no word; since then they are refused without `enable_gqa`.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend within each document by one kernel: q [T, H, D], k and v [T, G, D] to [T, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seq_lens = cu_seq_lens.to(torch.int32)
    left = -1 if window is None else window - 1  # transformers counts the token itself, flash attention does not
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(left, 0),
        **(varlen_arguments() or {}),
    )
    assert isinstance(output, torch.Tensor)  # a pair where the log-sum-exp is asked for too
    return output


def documents_with_dropout(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """As `varlen_documents`, which has no dropout, by the operator that it calls.

    sdpa of jagged tensors calls it too, and takes ten times as long on the host (12.9 against 1.2 ms on an H200).
    """
    ends = cu_seq_lens.to(torch.int32)
    output, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        dropout,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    assert isinstance(output, torch.Tensor)
    return output


def loop_over_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    """As `varlen_documents`, one document after another: for CPUs, float32 and GPUs before Ampere."""
    groups = query.shape[1] // key.shape[1]
    lengths = cu_seq_lens.diff().tolist()
    outputs = []
    for q, k, v in zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True):
        tokens = q.shape[1]
        mask = None
        if window is not None and window < tokens:
            mask = causal_window(tokens, window, q.device)
            k, v = (states.repeat_interleave(groups, dim=0) for states in (k, v))
        output = torch.nn.functional.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=mask is None and groups > 1,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
