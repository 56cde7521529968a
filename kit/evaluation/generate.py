"""The same prompts through base, adapter and merged model, side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kit.data.encode import encode_prompt, make_encoding
from kit.data.load import load_run_datasets
from kit.data.templates import run_template
from kit.errors import KitError
from kit.evaluation.examples import (
    Example,
    FewShotPrompt,
    choose_few_shot_style,
    encode_few_shot_prompt,
    example_from_row,
)
from kit.evaluation.sampling import generate_answers
from kit.models.inference import run_each_model
from kit.models.sources import ModelSource, choose_models, locate_models, open_source_tokenizer, output_path
from kit.rows.turns import RowProblem
from kit.storage.json_files import atomic_write_json

SAMPLES = "samples.json"
DEFAULT_PROMPTS = 5


def generate(
    source: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    prompts: Sequence[str | list[dict[str, Any]]] | None = None,
    which: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 8,
    dtype: str | None = None,
    device: str | None = None,
    out: Path | str | None = None,
    few_shot: Sequence[dict[str, Any]] | None = None,
    style: str | None = None,
) -> dict[str, Any]:
    """Answers of each model of `source` to each prompt; greedy unless `temperature` > 0.

    A prompt is text (a user turn where the tokenizer and the run's data are chat, else continued as it is) or a list
    of messages. `few_shot` rows add "base_few_shot": the base (or lone model) with these worked examples before each
    prompt, in the `style` "chat" (earlier turns) or "text" (lines).
    A run over a quantized base shows that base; a merge onto the original weights then differs from the adapter.
    Returns {"samples": [{prompt, outputs: {name: {text, tokens, stopped}}}], "adapter_equals_merged": bool or None,
    "first_difference", "skipped", "settings", "file"}; the samples are also written to samples.json.
    KitError for a bad source, prompt or setting.
    """
    check_generation_settings(
        max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p
    )
    models = locate_models(source, base, revision)
    names = choose_models(models, which)
    tokenizer = open_source_tokenizer(models)
    chosen, chat = _prompts(models, tokenizer, prompts, raw)
    date = ((models.plan or {}).get("tokenizer") or {}).get("date")
    encoding = make_encoding(tokenizer, run_template(tokenizer, False, date))
    encoded = [encode_prompt(tokenizer, p, chat=chat and not raw, system=system, encoding=encoding) for p in chosen]
    shots_for, shots = next((n for n in ("base", "model") if n in names), None), None
    if few_shot and shots_for:
        shots = FewShotPrompt.from_rows(few_shot, style or choose_few_shot_style(models, tokenizer))
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings["seed"] = seed

    def use(name: str, model: Any) -> dict[str, list[dict[str, Any]]]:
        outputs = {name: generate_answers(model, tokenizer, encoded, batch_size=batch_size, **settings)}
        if shots and name == shots_for:
            ids = [encode_few_shot_prompt(tokenizer, Example(p, None), shots, system=system) for p in chosen]
            outputs[f"{name}_few_shot"] = generate_answers(
                model, tokenizer, ids, batch_size=batch_size, stop_text=shots.stop_text, **settings
            )
        return outputs

    parts = run_each_model(use, models, names, tokenizer, dtype=dtype, device=device)
    samples = _collect_samples(chosen, parts.values())
    path = output_path(models, out, SAMPLES)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, samples)
    settings |= {"raw": raw, "system": system, "few_shot": len(shots.examples) if shots else 0}
    return _report(models, samples, settings, path)


def _collect_samples(prompts: Sequence[Any], parts: Iterable[dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """[{prompt, outputs: {name: answer}}] of the answers by model."""
    columns = {name: outputs for part in parts for name, outputs in part.items()}
    return [
        {"prompt": prompt, "outputs": {name: outputs[i] for name, outputs in columns.items()}}
        for i, prompt in enumerate(prompts)
    ]


def _report(
    source: ModelSource, samples: list[dict[str, Any]], settings: dict[str, Any], path: Path | None
) -> dict[str, Any]:
    """What `generate` returns, adapter and merged compared where both answered."""
    both = bool(samples) and {"adapter", "merged"} <= samples[0]["outputs"].keys()
    difference = first_difference(samples) if both else None
    return {
        "samples": samples,
        "adapter_equals_merged": difference is None if both else None,
        "first_difference": difference,
        "skipped": source.skipped,
        "settings": settings | {"quantized_base": source.quantized},
        "file": str(path) if path else None,
    }


def check_generation_settings(
    *, max_new_tokens: int, batch_size: int, temperature: float = 0.0, top_p: float | None = None
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise KitError(f"{name} is {value}", where=name, fix="give at least 1")
    if not temperature >= 0:
        raise KitError(f"temperature is {temperature}", where="temperature", fix="0 is greedy, 1 samples as trained")
    if top_p is not None and not 0 < top_p <= 1:
        raise KitError(f"top_p is {top_p}", where="top_p", fix="give a number over 0, at most 1")


def _prompts(
    source: ModelSource, tokenizer: Any, asked: Sequence[str | list[dict]] | None, raw: bool
) -> tuple[list[str | list[dict]], bool]:
    """The prompts and whether text among them is a user turn."""
    template = bool(getattr(tokenizer, "chat_template", None))
    given = list(asked if asked is not None else (source.plan or {}).get("prompts") or ())
    if asked is not None and not given:
        raise KitError("there are no prompts", where="prompts", fix="give at least one")
    if any(not isinstance(p, str | list) or not p for p in given):
        raise KitError(
            "a prompt is neither text nor a list of messages", where="prompts", fix="give text or a list of messages"
        )
    if given and (raw or not template or all(isinstance(p, list) for p in given) or source.plan is None):
        return given, template
    if source.plan is None:
        raise KitError("there are no prompts", where="prompts", fix="give --prompt TEXT")
    try:
        train, held_out = load_run_datasets(source.plan)
        rows = held_out if held_out is not None else train
        pairs = [example_from_row(rows[i], i) for i in range(min(DEFAULT_PROMPTS, len(rows)))]
    except (KitError, RowProblem):
        if not given:  # the data may be gone by now; the person's own prompts do not need it
            raise
        return given, template
    chat = template and all(isinstance(pair.prompt, list) for pair in pairs)
    if given:
        return given, chat
    return [_first_words(pair.prompt) for pair in pairs], chat


def _first_words(prompt: str | list[dict]) -> str | list[dict]:
    """A plain-text row has no question: its first words are the prompt."""
    if isinstance(prompt, str) and len(prompt) > 200:
        return prompt[:200].rsplit(None, 1)[0]
    return prompt


def first_difference(samples: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Where adapter and merged first part: {sample, position, adapter, merged} (token ids, None past the end)."""
    for index, sample in enumerate(samples):
        adapter, merged = (sample["outputs"][name]["tokens"] for name in ("adapter", "merged"))
        if adapter != merged:
            length = min(len(adapter), len(merged))
            position = next((n for n in range(length) if adapter[n] != merged[n]), length)
            return {
                "sample": index,
                "position": position,
                "adapter": adapter[position] if position < len(adapter) else None,
                "merged": merged[position] if position < len(merged) else None,
            }
    return None


def format_samples(samples: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """The samples as a table, one column per model; coloured on a terminal unless NO_COLOR is set."""
    names = list(samples[0]["outputs"]) if samples else []
    rows = []
    for sample in samples:
        outputs = [sample["outputs"][name] for name in names]
        rows.append(
            [
                _format_prompt(sample["prompt"]),
                *(o["text"].strip() + ("" if o["stopped"] else " […]") for o in outputs),
            ]
        )
    return format_table_text(["prompt", *names], rows, width=width, lines=True)


def _format_prompt(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)


def format_table_text(
    header: list[str], rows: list[list[str]], *, width: int | None = None, lines: bool = False
) -> str:
    """Text columns that fit the terminal; plain without colour or where the output is no terminal."""
    import shutil
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    columns = width or shutil.get_terminal_size((100, 24)).columns
    console = Console(
        file=StringIO(),
        width=columns,
        force_terminal=colour,
        no_color=not colour,
        legacy_windows=False,
        highlight=False,
    )
    grid = Table(box=box.ROUNDED if colour else box.ASCII2, show_lines=lines)
    for name in header:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(_escape_control(cell)) for cell in row))  # Text: an answer's brackets are not markup
    console.print(grid)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _escape_control(text: str) -> str:
    """Control characters as escapes: a model's output must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
