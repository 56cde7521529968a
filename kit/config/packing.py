"""Decides trainer.packing=auto from the run's data and its base alone, so that every machine decides it alike.

Packed rows hold several documents each: nothing is padded, and an epoch has that many times fewer optimizer steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from kit.config.inputs import Sample
from kit.config.report import Report
from kit.config.rules.model import RECURRENT, takes_lengths
from kit.errors import KitError
from kit.inspection.attention import choose_attention
from kit.inspection.model import Base
from kit.rows.files import DAMAGE, estimate_rows
from kit.rows.formats import CanonicalRow, row_turns, turn_text
from kit.schema import fields
from kit.schema.run_plan import Dataset, Documents, MixedSource, RunInput

# Llama 3's, Qwen 3's and Gemma 3's tokenizers make 0.20 to 0.24 tokens of a byte of English prose and Python, 0.20 to
# 0.27 of Chinese and Japanese, 0.17 to 0.23 of Russian, 0.26 to 0.30 of German, 0.5 to 0.65 of plain arithmetic.
TOKENS_PER_BYTE = 0.23
TOKENS_PER_TURN = 5  # role and marks of a turn in the templates of ChatML, Llama 3 and Gemma
MIN_STEPS = 100  # optimizer steps of an epoch: with fewer, packing takes more from training than padding costs
WORTH_SAYING = 10  # optimizer steps of an epoch below which nobody would pack


def resolve_packing(
    run: RunInput,
    samples: dict[str, Sample],
    base: Base,
    trainer: dict[str, Any],
    peft: dict[str, Any] | None,
    deepspeed: dict[str, Any] | None,
    global_batch_size: int,
    report: Report,
) -> bool:
    """Return whether documents are packed: short ones, enough of them, and an attention that keeps them apart.

    What it does to rows and steps is noted.
    """
    if not can_pack(run, base, trainer, peft, deepspeed):
        return False
    max_length = trainer.get("max_length", 1024)
    documents = find_documents(run.dataset, samples, trainer)
    if documents is None:
        report.note("packing: off, the number of rows is not known here; trainer.packing=true packs short documents")
        return False
    if not documents.count or documents.mean > max_length / 2:
        return False
    packed = documents.packed_rows(max_length)
    before, steps = (math.ceil(rows / global_batch_size) for rows in (documents.count, packed))
    short = f"documents of about {about(documents.mean)} tokens against max_length {max_length:,}"
    fewer = f"{about(steps)} optimizer steps an epoch instead of {about(before)}"
    passes = trainer.get("max_steps", -1) / steps  # over the data, where a number of steps ends the run
    if steps < MIN_STEPS or passes > 1:
        why = f"{passes:.1f} passes over the data instead of one or less" if passes > 1 else fewer
        if steps >= WORTH_SAYING:
            report.note(f"packing: off, {short}, but packed {why}; trainer.packing=true packs them")
        return False
    report.note(
        f"packing: on, {short}: {about(documents.count)} rows become about {about(packed)} rows of {max_length:,}, "
        f"{fewer}; trainer.packing=false keeps one document a row"
    )
    return True


def can_pack(
    run: RunInput, base: Base, trainer: dict[str, Any], peft: dict[str, Any] | None, deepspeed: dict[str, Any] | None
) -> bool:
    """Tell whether nothing that the run says speaks against packing; no rule refuses it then, nor warns of it."""
    attention = run.model.attn_implementation
    if attention == "auto":
        attention = choose_attention(base.text, {**trainer, "packing": True}, deepspeed)
    method = fields.field_tables().get(str((peft or {}).get("peft_type")).upper(), {})
    return not (
        not takes_lengths(attention)
        or base.text.get("model_type") in RECURRENT
        or run.model.trust_remote_code
        or run.launch.script  # whose callbacks and formatting may count rows
        or run.dataset.streaming
        or method.keys() & {"num_virtual_tokens", "cpt_token_ids"}  # a prompt would stand before the first document
        or trainer.get("padding_free")
        or trainer.get("max_length", 1024) is None
        or trainer.get("packing_strategy", "bfd") == "wrapped"
        or trainer.get("train_sampling_strategy", "random") != "random"
    )


def about(number: float) -> str:
    """Return a number as an estimate says it: two digits of it, then noughts."""
    return f"{float(f'{number:.2g}'):,.0f}"


# ---- the data ----


def find_documents(dataset: Dataset, samples: dict[str, Sample], trainer: dict[str, Any]) -> Documents | None:
    """Return `estimate_documents`, and None for damaged data, which is told by those who read it."""
    with suppress(KitError, ImportError, *DAMAGE):
        return estimate_documents(dataset, samples, trainer)
    return None


def estimate_documents(dataset: Dataset, samples: dict[str, Sample], trainer: dict[str, Any]) -> Documents | None:
    """Estimate what kit/data/load.py reads and kit/data/prepare.py cuts; None where no rows are here to be counted."""
    sources = {f"dataset.mix.{number}.path": source for number, source in enumerate(dataset.mix)}
    parts: list[Documents] = []
    for key in sources or ["dataset.path"]:
        part = estimate_set(dataset, samples[key], trainer) if key in samples else None
        if part is None:
            return None
        parts.append(part)
    count, shares = mix_counts(dataset, [part.count for part in parts])
    kept = min(count, dataset.limit or count)
    mean, large = (sum(s * getattr(p, of) for s, p in zip(shares, parts, strict=True)) for of in ("mean", "large"))
    return Documents(count=kept, mean=mean, large=large)


def estimate_set(dataset: Dataset, sample: Sample, trainer: dict[str, Any]) -> Documents | None:
    """The same of one data set, before the sets are mixed."""
    max_length = trainer.get("max_length", 1024)
    on_long_row = dataset.on_long_row
    if trainer.get("packing_strategy") == "bfd_split" and on_long_row == "truncate":
        on_long_row = "split"
    lengths = [n for row in sample.rows for n in cut_lengths(estimate_tokens(row), max_length, on_long_row)]
    rows = slice_rows(sample.split, estimate_rows(sample.files, sample.raw)) if lengths else None
    if rows is None:
        return None
    source = sample.source
    if isinstance(source, MixedSource):
        rows = min(rows, source.limit or rows)
    if dataset.test_size and not (dataset.eval_path or dataset.eval_split):
        held = dataset.test_size + (dataset.validation_size or 0)
        rows = max(rows - held if held >= 1 else rows * (1 - held), 0)
    large = sum(n > max_length / 2 for n in lengths) / len(lengths)
    count = rows * len(lengths) / len(sample.raw)
    return Documents(count=count, mean=sum(lengths) / len(lengths), large=large)


def mix_counts(dataset: Dataset, counts: list[float]) -> tuple[float, list[float]]:
    """Return the documents of all sets together and each one's share: in turn, or drawn by weights (mix_rows)."""
    weights = [source.weight or 0 for source in dataset.mix]
    if len(counts) == 1 or not any(weights):
        total = sum(counts)
        return total, [count / total if total else 0 for count in counts]
    shares = [weight / sum(weights) for weight in weights]
    drawn = [count / share for count, share in zip(counts, shares, strict=True) if share]
    return (min if dataset.mix_until == "first_exhausted" else max)(drawn), shares


def slice_rows(split: str, rows: float) -> float | None:
    """Return how many of a split's rows an expression such as "train[:10%]" takes; None where it adds splits."""
    if "[" not in split and "+" not in split:
        return rows
    if not (bounds := re.fullmatch(r"\w+\[(-?\d+%?)?:(-?\d+%?)?\]", split)):
        return None
    first, last = (b and (int(b[:-1]) * rows / 100 if b.endswith("%") else int(b)) for b in bounds.groups())
    begin, end, _ = slice(*(b if b is None else int(b) for b in (first, last))).indices(int(rows))
    return max(end - begin, 0)


def cut_lengths(tokens: int, max_length: int, on_long_row: str) -> Iterable[int]:
    """Return the lengths of what becomes of a document (dataset.on_long_row)."""
    if tokens <= max_length:
        return [tokens]
    if on_long_row == "split":
        return [max_length] * (tokens // max_length) + [tokens % max_length] * (tokens % max_length > 0)
    return [] if on_long_row == "drop" else [max_length]


def estimate_tokens(row: CanonicalRow) -> int:
    """Estimate the tokens of a canonical row as its chat template writes it."""
    if "input_ids" in row:
        return len(row["input_ids"])
    turns = row_turns(row)
    calls = [row.get("tools"), *(turn.get("tool_calls") for turn in turns if isinstance(turn, dict))]
    written = [*map(turn_text, turns), *(json.dumps(call, ensure_ascii=False) for call in calls if call)]
    size = sum(len(text.encode(errors="replace")) for text in written)
    marks = sum(TOKENS_PER_TURN for turn in turns if isinstance(turn, dict)) or 1  # the end token of plain text
    return round(size * TOKENS_PER_BYTE) + marks
