"""How added tokens are trained: the embeddings at both ends of the model go into PEFT's modules_to_save.

Why whole matrices and not PEFT's trainable_token_indices, which would keep the adapter small: the loss of TRL 1.16
reads lm_head.weight itself, so rows that PEFT lays over lm_head would be left out of it; under ZeRO-3 PEFT gathers
them on CUDA only (peft tuners/trainable_tokens/layer.py); and a file with rows beyond the base's own vocabulary can
neither be merged nor served. modules_to_save works in one process, DDP and every ZeRO stage, and the merge replaces
both matrices.
"""

from __future__ import annotations

from typing import Any

from kit.errors import Problem
from kit.inspection.architectures import EMBEDDING, EMBEDDINGS, INPUT_EMBEDDINGS, LINEARS, OUTPUT_EMBEDDINGS
from kit.inspection.model import Base
from kit.schema import fields

# transformers' configs that tie where config.json does not say (a value that is the class's default is not written).
TIED_BY_DEFAULT = ("gpt2", "opt", "gemma", "gemma2", "gemma3_text")


def vocabulary_rows(base: Base) -> int | None:
    """Rows of the base's embedding, from its config; None where that is not known."""
    rows = base.text.get("vocab_size")
    return rows if isinstance(rows, int) else None


def is_tied(base: Base) -> bool | None:
    """Whether one matrix serves both ends; None where that is not known."""
    kind = base.text.get("model_type")
    for part in (base.config or {}, base.text):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    if kind in TIED_BY_DEFAULT or kind in LINEARS:
        return kind in TIED_BY_DEFAULT
    return None


def find_embedding_names(base: Base) -> tuple[str, str] | None:
    """The leaf names of the input and output embedding; None where they cannot be known."""
    kind = base.text.get("model_type", "")
    if kind in LINEARS:
        return EMBEDDINGS.get(kind, EMBEDDING).rpartition(".")[2], "lm_head"
    leaves = {m.rpartition(".")[2] for m in base.modules or ()}
    first = [n for n in INPUT_EMBEDDINGS if n in leaves]
    last = [n for n in OUTPUT_EMBEDDINGS if n in leaves]
    if len(first) == 1 and (len(last) == 1 or is_tied(base)):
        return first[0], last[0] if last else "lm_head"
    return None


def train_embeddings(
    peft: dict[str, Any] | None, base: Base, tokens: list[str]
) -> tuple[dict[str, Any] | None, list[Problem], list[str]]:
    """The adapter's settings with both embeddings in modules_to_save where `tokens` are new; problems and notes.

    Full fine-tuning trains them anyway.
    """
    if peft and peft.get("trainable_token_indices") and is_tied(base):
        problem = "TRL's loss cannot read a tied embedding that PEFT has laid rows over"
        fix = "leave it out, and train the matrix: peft.modules_to_save=[embed_tokens] peft.ensure_weight_tying=true"
        return peft, [Problem(problem, "peft.trainable_token_indices", fix, "token-indices-tied")], []
    if not tokens or not peft:
        return peft, [], []
    key, kind = "tokenizer.added_tokens", str(peft.get("peft_type", "LORA")).upper()
    table = fields.field_tables().get(kind, {})
    if "modules_to_save" not in table:
        problem = f"{kind} cannot train the embeddings of added tokens"
        return peft, [Problem(problem, key, "peft=lora, or peft=none", "added-tokens")], []
    if peft.get("trainable_token_indices"):
        problem = "added tokens are trained with the whole embeddings; trainable_token_indices names rows of the same"
        return peft, [Problem(problem, "peft.trainable_token_indices", "leave it out", "added-tokens")], []
    ends, tied = find_embedding_names(base), is_tied(base)
    saved = list(peft.get("modules_to_save") or [])
    if ends is None or tied is None:
        if saved:  # the person has named them; the ranks verify that they are the embeddings
            return peft, [], []
        problem = "which modules embed the tokens of this base is not known here, so the added ones cannot be trained"
        return (
            peft,
            [Problem(problem, key, "name them: peft.modules_to_save=[embed_tokens,lm_head]", "added-tokens")],
            [],
        )
    targets = peft.get("target_modules")
    named = targets if isinstance(targets, list) else []
    if clash := [t for t in named if str(t).rpartition(".")[2] in ends]:
        problem = f"{', '.join(clash)} is a LoRA target, and added tokens need it trained whole"
        return peft, [Problem(problem, "peft.target_modules", f"take {', '.join(clash)} out", "added-tokens")], []
    if tied and "ensure_weight_tying" not in table:
        problem = f"the base ties its embeddings, and {kind} cannot train them tied"
        return peft, [Problem(problem, key, "peft=lora, or peft=none", "added-tokens")], []
    have = {str(m).rpartition(".")[2] for m in saved}
    peft = {**peft, "modules_to_save": [*saved, *(n for n in ends if n not in have)]}
    if tied:
        peft["ensure_weight_tying"] = True
    what = "the tied embedding is" if tied else f"{ends[0]} and {ends[1]} are"
    return (
        peft,
        [],
        [f"{what} trained and saved whole with the adapter (peft.modules_to_save)"],
    )
