"""The files of a Meta checkpoint: where every tensor lies in them, and how the ranks' slices fit together.

torch's weights-only loader reads nothing but the pickle that says where the tensors lie, and gives their offsets in
the file (FakeTensorMode, https://docs.pytorch.org/docs/stable/notes/serialization.html); no file is mapped or loaded.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path

from kit.converting.config import MetaParams
from kit.converting.stream import JoinedTensor
from kit.converting.tokenizer import Vocabulary
from kit.errors import KitError, Problem, first_line
from kit.storage.safetensors_header import META_PARAMS, TensorEntry

STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Meta's name -> transformers' name, and the axis along which ranks split the matrix; None: every rank holds it all.
LAYER_TENSORS = {
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
IGNORED = {"rope.freqs"}  # params.json gives them
FETCH_AGAIN = "fetch all files of one release again"


def read_shard(file: Path) -> dict[str, TensorEntry]:
    """Where every tensor of one consolidated.NN.pth lies; KitError where the file is damaged or holds other things."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist())
        with FakeTensorMode():
            loaded = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        raise KitError(
            f"{file} holds more than tensors ({match[1] if match else 'an unknown pickle'}):"
            " torch's weights-only loader refuses it",
            fix="fetch it from Meta again: a pickle that asks for more could run any code",
        ) from None
    except Exception as error:  # zipfile and torch name a cut file in many ways
        raise KitError(f"{file} is damaged or cut short: {first_line(error)}", fix="fetch the file again") from None
    if packed or not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise KitError(f"{file} is not a dict of tensors as torch.save writes it", fix="fetch it from Meta again")
    size, tensors, problems = file.stat().st_size, {}, []
    for name, t in loaded.items():
        if name in IGNORED:
            continue
        dtype = str(t.dtype).removeprefix("torch.")
        if dtype not in STORED:
            fix = f"convert a release that is stored in {', '.join(STORED)}"
            problems.append(Problem(f"{name} is {dtype}", str(file), fix))
            continue
        if t.dim() not in (1, 2) or not t.is_contiguous():
            problems.append(Problem(f"{name} is no plain matrix: {list(t.shape)}", str(file), FETCH_AGAIN))
            continue
        start = t.untyped_storage()._checkpoint_offset + t.storage_offset() * t.itemsize
        end = start + t.numel() * t.itemsize
        if end > size:
            problems.append(Problem(f"{file} is cut short: {name} ends behind it", fix="fetch the file again"))
        tensors[name] = TensorEntry(name, file, STORED[dtype], tuple(t.shape), start, end)
    if problems:
        raise KitError(first_ten(problems))
    return tensors


def read_shards(files: list[Path]) -> list[dict[str, TensorEntry]]:
    """All shards; KitError with what is wrong with each of them."""
    shards, problems = [], []
    for file in files:
        try:
            shards.append(read_shard(file))
        except KitError as error:
            problems += error.problems
    if problems:
        raise KitError(problems)
    return shards


def join_slices(
    shards: list[dict[str, TensorEntry]], params: MetaParams, vocabulary: Vocabulary, stored: str | None
) -> list[JoinedTensor]:
    """What the converted model holds, embedding first, output last; KitError with all that does not fit params.json.

    `stored`: the safetensors dtype of all tensors, None for each as it is.
    """
    targets: dict[str, tuple[str, int | None]] = {EMBEDDING: ("model.embed_tokens.weight", 0)}
    for i in range(params.n_layers):
        targets |= {
            f"layers.{i}.{k}.weight": (f"model.layers.{i}.{v[0]}.weight", v[1]) for k, v in LAYER_TENSORS.items()
        }
    targets["norm.weight"] = ("model.norm.weight", None)
    if any(OUTPUT in shard for shard in shards):
        targets[OUTPUT] = ("lm_head.weight", 0)
    check_names(shards, set(targets))
    check_shard_count(shards, params)
    ranks, dim, head_dim = len(shards), params.dim, params.dim // params.n_heads
    embedding = shards[0][EMBEDDING].shape
    by_rows = embedding[-1] == dim  # Llama-3 splits the vocabulary, Llama-2 the hidden size
    entries = embedding[0] * (ranks if by_rows else 1)
    problems = check_vocabulary(entries, params, vocabulary)
    kv, feed = params.n_kv_heads * head_dim, shards[0]["layers.0.feed_forward.w1.weight"].shape[0] * ranks
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings": (entries, dim), "output": (entries, dim),
        "wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim),
        "w1": (feed, dim), "w2": (dim, feed), "w3": (feed, dim),
    }  # fmt: skip
    joined = []
    for name, (target, axis) in targets.items():
        kind = name.split(".")[-2]
        shape = shapes.get(kind, (dim,))
        slices = [shard[name] for shard in shards]
        if kind == "tok_embeddings" and not by_rows:
            axis = 1
        if axis is None:
            slices = one_copy_each(slices, ranks, problems)
        elif kind in ("wk", "wv") and ranks > params.n_kv_heads:  # a head for several ranks: neighbours hold the same
            slices = one_copy_each(slices, ranks // params.n_kv_heads, problems)
        part = list(shape)
        part[axis or 0] //= len(slices)
        for s in slices:
            if list(s.shape) != part:
                problem = f"{name} is {list(s.shape)}, {META_PARAMS} and the other tensors ask for {part}"
                problems.append(Problem(problem, str(s.file), FETCH_AGAIN))
        order = head_dim if kind in ("wq", "wk") else None
        joined.append(JoinedTensor(target, stored or slices[0].dtype, shape, slices, axis or 0, order))
    if problems:
        raise KitError(first_ten(problems))
    return joined


def check_names(shards: list[dict[str, TensorEntry]], expected: set[str]) -> None:
    """KitError where a shard lacks a tensor, or has one that a Llama text model does not."""
    problems = []
    for shard in shards:
        file = next((t.file for t in shard.values()), "a shard")
        if any(name.startswith("vision_model.") for name in shard):
            fix = "take the text model of the same generation"
            raise KitError(f"{file} holds a vision model: the kit trains text models", fix=fix)
        for problem, names in (("lacks", expected - set(shard)), ("holds unknown tensors:", set(shard) - expected)):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                problems.append(Problem(f"{file} {problem} {listed}", f"against {META_PARAMS}", FETCH_AGAIN))
    if problems:
        raise KitError(problems)


def check_shard_count(shards: list[dict[str, TensorEntry]], params: MetaParams) -> None:
    """KitError where the shards are too few or too many to make up the first layer's query projection."""
    query = shards[0]["layers.0.attention.wq.weight"]
    rows = query.shape[0]
    if rows * len(shards) == params.dim:
        return
    parts = params.dim // rows if rows and params.dim % rows == 0 else None
    raise KitError(
        f"{query.file} is one of {parts} shards, and {len(shards)} are here"
        if parts
        else f"{query.file} and {META_PARAMS} do not belong together",
        where=f"wq has {rows} rows, {META_PARAMS} says dim {params.dim}",
        fix=FETCH_AGAIN,
    )


def check_vocabulary(entries: int, params: MetaParams, vocabulary: Vocabulary) -> list[Problem]:
    problems = []
    if params.vocab_size not in (-1, entries):
        problem = f"{META_PARAMS} says vocab_size {params.vocab_size}, the embeddings have {entries} rows"
        problems.append(Problem(problem, EMBEDDING, FETCH_AGAIN))
    if vocabulary.size > entries:
        problem = f"{vocabulary.path} has {vocabulary.size} tokens, the embeddings have {entries} rows"
        problems.append(Problem(problem, EMBEDDING, "give the tokenizer.model of this release"))
    return problems


def one_copy_each(slices: list[TensorEntry], copies: int, problems: list[Problem]) -> list[TensorEntry]:
    """One of each `copies` neighbours; a problem where they are not equal, as in shards of two models."""
    for i, s in enumerate(slices):
        original = slices[i - i % copies]
        if s is not original and (s.shape != original.shape or _bytes(s) != _bytes(original)):
            problems.append(Problem(f"{s.name} is not that of {original.file.name}", str(s.file), FETCH_AGAIN))
    return slices[::copies]


def _bytes(tensor: TensorEntry) -> bytes:
    with open(tensor.file, "rb") as handle:
        handle.seek(tensor.start)
        return handle.read(tensor.end - tensor.start)


def first_ten(problems: list[Problem]) -> list[Problem]:
    """The first ten: one wrong number in params.json makes hundreds."""
    more = len(problems) - 10
    rest = Problem(f"and {more} more of this kind", fix="mend the first: the others follow from it")
    return problems if more <= 0 else [*problems[:10], rest]
