"""params.json of a Meta checkpoint, and the config.json that says the same to transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.converting.stream import JoinedTensor
from kit.converting.tokenizer import Vocabulary
from kit.errors import KitError, Problem
from kit.merging.stream import torch_dtype

POSITIVE_PARAMS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "rope_theta", "norm_eps")
NEEDED_PARAMS = ("dim", "n_layers", "n_heads", "norm_eps")
# ffn_dim_multiplier and multiple_of give the intermediate size, which w1 shows; the rest belongs to Meta's runtime.
UNUSED_PARAMS = ("ffn_dim_multiplier", "multiple_of", "max_seq_len", "max_batch_size", "model_parallel_size")


@dataclass(frozen=True)
class MetaParams:
    """params.json; `vocab_size` is -1 where the tokenizer decides, `rope_theta` None where the generation does."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float | None
    use_scaled_rope: bool
    given: dict[str, Any]


def read_meta_params(path: Path) -> MetaParams:
    """params.json; KitError with everything that is missing, wrong, or of another architecture."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KitError(
            f"{path.parent} has no {path.name}: it is not a Meta checkpoint", "DIR", "fetch it with the weights"
        ) from None
    except (OSError, ValueError) as error:
        raise KitError(f"{path} is not JSON: {error}", "DIR", "fetch the file again") from None
    if isinstance(given, dict) and isinstance(given.get("model"), dict):
        given = given["model"]
    if not isinstance(given, dict):
        raise KitError(f"{path} does not hold a JSON object", "DIR", "fetch the file again")
    problems = _other_architectures(path, given)
    for key in NEEDED_PARAMS:
        if key not in given:
            problems.append(Problem(f"{path} lacks {key}", str(path), "fetch the file again"))
    for key in POSITIVE_PARAMS:
        value = given.get(key)
        if value is None or (key == "vocab_size" and value == -1):
            continue
        kind = (int, float) if key in ("rope_theta", "norm_eps") else int
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            problems.append(Problem(f"{path} says {key} {value!r}", str(path), "fetch the file again"))
    if not isinstance(given.get("use_scaled_rope", False), bool):
        problems.append(
            Problem(f"{path} says use_scaled_rope {given['use_scaled_rope']!r}", str(path), "true or false")
        )
    if problems:
        raise KitError(problems)
    dim, heads = given["dim"], given["n_heads"]
    key_heads = given.get("n_kv_heads") or heads
    if dim % heads or dim // heads % 2 or heads % key_heads:
        raise KitError(
            f"{path} says dim {dim}, n_heads {heads}, n_kv_heads {key_heads}: they do not divide",
            str(path),
            "fetch the file again",
        )
    return MetaParams(
        dim=dim,
        n_layers=given["n_layers"],
        n_heads=heads,
        n_kv_heads=key_heads,
        norm_eps=given["norm_eps"],
        vocab_size=given.get("vocab_size") or -1,
        rope_theta=given.get("rope_theta"),
        use_scaled_rope=given.get("use_scaled_rope", False),
        given=given,
    )


def _other_architectures(path: Path, given: dict[str, Any]) -> list[Problem]:
    """Keys that change what the weights mean: another model in the same clothes must not pass as Llama."""
    unknown = sorted(set(given) - {*POSITIVE_PARAMS, *UNUSED_PARAMS, "use_scaled_rope"})
    if any(k.startswith("vision") for k in unknown):
        return [
            Problem(
                f"{path} describes a vision model ({', '.join(unknown)}): the kit trains text models",
                str(path),
                "take the text model of the same generation",
            )
        ]
    if quantized := [k for k in unknown if k in ("quantization_args", "lora_args")]:
        return [
            Problem(
                f"{path} describes quantized weights ({', '.join(quantized)})",
                str(path),
                "convert the bfloat16 release; quantization=nf4 quantizes it when it is loaded",
            )
        ]
    if unknown:
        return [
            Problem(
                f"{path} has keys that no Llama text model has: {', '.join(unknown)}",
                str(path),
                "the weights belong to another architecture: use the converter of its makers",
            )
        ]
    return []


def build_model_config(
    params: MetaParams,
    vocabulary: Vocabulary,
    tensors: list[JoinedTensor],
    tied: bool,
    max_position_embeddings: int | None,
) -> tuple[Any, Any, list[str]]:
    """LlamaConfig, GenerationConfig, and what params.json did not say and was decided here."""
    from transformers import GenerationConfig, LlamaConfig

    shapes = {t.name.split(".")[-2]: t.shape for t in tensors}
    vocab_size, notes = shapes["embed_tokens"][0], []
    theta = params.rope_theta
    if vocabulary.ranks is None:
        theta = theta or 10000.0
        length, release = (16384, "Code Llama") if theta > 10000 else (4096, "Llama-2")
    elif theta is None:
        raise KitError("params.json lacks rope_theta, which every Llama-3 has", "DIR", "fetch the file again")
    else:
        length, release = (131072, "Llama-3.1 and later") if params.use_scaled_rope else (8192, "Llama-3")
    if max_position_embeddings is None:
        notes.append(f"max_position_embeddings {length}, that of {release}: --max-position-embeddings sets another")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theta)}
    if params.use_scaled_rope:
        # params.json names no factor: the releases that tie their embeddings are Llama-3.2's (32), the others have 8.
        factor = 32.0 if tied else 8.0
        rope |= {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        notes.append(f"RoPE scaling factor {factor:.0f}, that of Llama-3.{'2 1B and 3B' if tied else '1 and 3.3'}")
    if vocabulary.size < vocab_size:
        notes.append(f"the tokenizer has {vocabulary.size} tokens, the embeddings have {vocab_size} rows")
    bos, ends = vocabulary.bos_and_ends(params.use_scaled_rope)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=params.dim,
        intermediate_size=shapes["gate_proj"][0],
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        max_position_embeddings=max_position_embeddings or length,
        rms_norm_eps=params.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=ends[0],
        dtype=torch_dtype(tensors[0].dtype),
    )
    generation = GenerationConfig(bos_token_id=bos, eos_token_id=ends if len(ends) > 1 else ends[0])
    return config, generation, notes
