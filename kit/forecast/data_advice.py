"""What published figures say about a run's tokens: against its parameters, repeated, and estimated from bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection.data_files import find_data_files
from kit.schema.run_plan import RunPlan

FROM_SCRATCH = 20  # tokens a parameter of compute-optimal pre-training: Hoffmann et al. 2022, arXiv 2203.15556
NEARLY_FRESH, LITTLE_WORTH = 4, 16  # passes over the same data: Muennighoff et al. 2023, arXiv 2305.16264
REPETITION = 15.387756  # R*_D of that paper: what repeated passes are worth at most, in fresh ones
LARGE_VOCABULARY = 120_000
# Tokens a byte of text in letters of one or two bytes, and of text in characters of three, by size of the vocabulary.
# Measured:                                 English   Python, Markdown     Chinese       Japanese, Korean     Russian
# Llama 3, Qwen 3, Gemma 3, DeepSeek 3,
# gpt-oss (128,000 to 262,000)           0.20 to 0.22   0.25 to 0.31   0.20 to 0.31     0.18 to 0.28     0.13 to 0.17
# Llama 2 (32,000)                       0.22 to 0.24   0.32 to 0.33   0.36 to 0.37     0.37 to 0.44         0.21
# GPT-3.5 (100,000)                      0.20 to 0.21                      0.40         0.37 to 0.38         0.24
# A vocabulary without Chinese words makes up to 2 tokens of a character, which is 3 bytes.
RATES = {True: ((0.20, 0.31), (0.18, 0.33)), False: ((0.20, 0.34), (0.33, 0.67))}
TEXT_FILES = (".jsonl", ".ndjson", ".json", ".txt", ".csv", ".tsv", ".md")
SAMPLE = 2**20  # bytes of a file that are looked at
ESCAPED = re.compile(rb"\\u([0-9a-fA-F]{4})")  # as JSON may write a character that is not ASCII


@dataclass(frozen=True)
class Tokens:
    """An estimate: the fewest and the most, and how it was made."""

    fewest: float
    most: float
    formula: str


def estimate_tokens(size: float, wide: float, vocabulary: int) -> Tokens:
    """Estimate the tokens of so many bytes of UTF-8, of prose and source code.

    wide: the share of bytes in characters of three, as in Chinese, Japanese and Korean; those of two, as in Russian,
    count like ASCII, for they become about as many tokens or fewer.
    """
    narrow_rates, wide_rates = RATES[vocabulary >= LARGE_VOCABULARY]
    parts = [(1 - wide, narrow_rates, ""), (wide, wide_rates, " in characters of 3")]
    fewest, most = (size * sum(share * rates[end] for share, rates, _ in parts) for end in (0, 1))
    said = [f"{share:.0%}{what} x {low:.2f} to {high:.2f}" for share, (low, high), what in parts if share >= 0.005]
    return Tokens(fewest, most, f"{say(size)} bytes, {', '.join(said)}")


def worth_of_passes(passes: float) -> float:
    """Return how many passes over fresh data so many over the same are worth: D' / U of arXiv 2305.16264."""
    return 1 + REPETITION * (1 - math.exp((1 - passes) / REPETITION)) if passes > 1 else passes


def advise(plan: RunPlan, text: Mapping[str, Any], figures: Mapping[str, Any], rate: float) -> list[str]:
    """Return sentences with figures of this run. rate: of tokens a byte, by which its documents are estimated.

    text: the config of the language model. figures: the run's parameters, and the total of its tokens where known.
    """
    documents, vocabulary = plan.documents, int(text.get("vocab_size") or 0)
    epoch = documents.count * documents.mean if documents else None
    passes = count_passes(plan)
    said = advise_bytes(plan, epoch, rate, vocabulary)
    whole = epoch * passes if epoch and passes else (figures.get("total") or {}).get("tokens")
    if whole and (not plan.peft or plan.dataset.format == "text"):
        said.append(advise_size(epoch, whole, figures["run"]["parameters"]))
    if passes and passes > NEARLY_FRESH:
        said.append(advise_passes(passes, epoch))
    return said


def count_passes(plan: RunPlan) -> float | None:
    """Return how often a run goes over its data; None where max_steps ends it and the rows are not known."""
    steps = plan.trainer.get("max_steps") or -1
    if steps <= 0:
        return float(plan.trainer.get("num_train_epochs", 3))
    rows, documents = plan.rows, plan.documents
    if rows is None and documents:
        packed = plan.trainer.get("packing")
        rows = round(documents.packed_rows(plan.trainer["max_length"]) if packed else documents.count)
    return steps * plan.global_batch_size / rows if rows else None


def advise_size(epoch: float | None, whole: float, parameters: int) -> str:
    """Say what a run's tokens are beside its parameters, and what that is no measure of."""
    each = f"about {say(epoch)} tokens an epoch, " if epoch else ""
    return (
        f"{each}{'about' if epoch else 'at most'} {say(whole)} in the run: {whole / parameters:.2g} for each of "
        f"{say(parameters)} parameters. Pre-training from scratch takes about {FROM_SCRATCH}, "
        f"{say(FROM_SCRATCH * parameters)} (Hoffmann et al. 2022, arXiv 2203.15556); fine-tuning needs no such number"
    )


def advise_passes(passes: float, epoch: float | None) -> str:
    """Say what so many passes over the same data are worth."""
    over = f" over about {say(epoch)} tokens" if epoch else ""
    return (
        f"{passes:.3g} passes{over} are worth about {worth_of_passes(passes):.1f} over fresh ones: up to about "
        f"{NEARLY_FRESH} are nearly as good, beyond about {LITTLE_WORTH} worth little, in pre-training "
        "(Muennighoff et al. 2023, arXiv 2305.16264)"
    )


def advise_bytes(plan: RunPlan, epoch: float | None, rate: float, vocabulary: int) -> list[str]:
    """Estimate tokens from the bytes of the data's files: where nothing else did, or where `rate` is another's.

    The rate is that of large vocabularies: smaller ones make more tokens of Chinese.
    """
    sample = sample_files(find_files(plan))
    if sample is None or not vocabulary:
        return []
    size, wide = sample
    if epoch is None:
        found = estimate_tokens(size, wide, vocabulary)
        amount = f"{say(found.fewest)} to {say(found.most)} tokens"
        return [f"the data's files are {amount} with a vocabulary of {vocabulary:,}: {found.formula}"]
    found = estimate_tokens(epoch / rate, wide, vocabulary)
    if found.fewest <= epoch <= found.most:
        return []
    return [
        f"an epoch may be {say(found.fewest)} to {say(found.most)} tokens rather than {say(epoch)}, which is "
        f"{rate:g} a byte: with a vocabulary of {vocabulary:,}, {found.formula}"
    ]


def find_files(plan: RunPlan) -> list[Path]:
    """Return the files that a run trains on, all of each, where they are text and here."""
    found: list[Path] = []
    with suppress(KitError, OSError):
        for split in set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\[.*?\]", "", plan.dataset.split))):
            found += find_data_files(plan.dataset.path or [], split, plan.dataset.name) or []
    return [file for file in found if file.suffix in TEXT_FILES]


def sample_files(files: Iterable[Path]) -> tuple[float, float] | None:
    """Return the bytes of files and the share in characters of three, by their first ones; None without any."""
    size, looked, text = 0.0, 0, b""
    with suppress(OSError):
        for file in files:
            size += file.stat().st_size
            if looked < SAMPLE:
                with file.open("rb") as opened:
                    first = opened.read(SAMPLE - looked)
                looked += len(first)
                text += ESCAPED.sub(lambda code: chr(int(code[1], 16)).encode(errors="replace"), first)
    if not text:
        return None
    leads = len(text) - len(text.translate(None, bytes(range(0xE0, 0x100))))  # the first byte of three, or of four
    return size * len(text) / looked, 3 * leads / len(text)


def say(number: float) -> str:
    """Return a number by its two first digits, in words where it is large."""
    rounded = float(f"{number:.2g}")
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if rounded >= size:
            return f"{rounded / size:.2g} {word}" if rounded < 100 * size else f"{rounded / size:.0f} {word}"
    return f"{rounded:,.0f}"
