"""What a model scores on held-out rows: exact match, loss and perplexity of the answers, beside plain baselines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.data.encode import (
    Encoded,
    Pair,
    Shots,
    as_pair,
    draw,
    encode_pair,
    few_shot_style,
    read_rows,
    shot_turns,
    with_shots,
)
from kit.errors import ENVIRONMENT, KitError
from kit.evaluation.generate import check_settings, table
from kit.evaluation.sampling import decode, stop_ids
from kit.models.inference import each_model
from kit.models.sources import Source, choose, open_tokenizer, output_path, resolve, run_datasets, write_json

METRICS = ("exact_match", "loss", "perplexity")
EVAL = "eval.json"
IGNORED = -100
LOGITS = 2**28  # logits of one forward pass at most: 1 GiB in float32
MISTAKES = 5


def evaluate(
    source: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    data: str | Path | Sequence[dict[str, Any]] | None = None,
    train_data: str | Path | Sequence[dict[str, Any]] | None = None,
    which: Sequence[str] | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    few_shot: int = 0,
    style: str | None = None,
    most_frequent: bool = True,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    out: Path | str | None = None,
) -> dict[str, Any]:
    """Score each model of `source` on the run's held-out rows, or on `data` (rows or a .jsonl file).

    exact_match: the share of rows whose greedy answer equals the reference once both are stripped; an answer that did
    not end within `max_new_tokens` is wrong and counted as unstopped. loss: nats per reference token, end token
    included, mean over all tokens of all rows; plain text rows count every token but the first and have no
    exact match. perplexity = exp(loss). `few_shot` adds the base (or lone model) with that many worked examples from
    the training rows, `most_frequent` the score of always giving their commonest answer.
    Returns {"models": {name: {...}}, "rows", "skipped", "settings", "file"}, also written to eval.json; a value that
    does not apply is None. KitError for a bad source, row or setting.
    """
    check_settings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    for name in metrics:
        if name not in METRICS:
            raise KitError(
                f"the metric {name!r} is not known", where="metrics", fix=f"choose from {', '.join(METRICS)}"
            )
    if limit is not None and limit < 1:
        raise KitError(f"limit is {limit}", where="limit", fix="give at least 1")
    found = resolve(source, base, revision)
    names = choose(found, which)
    train, held_out, origin = _rows(found, data, train_data)
    pairs, skipped = _pairs(held_out, limit)
    answered = pairs[0].completion is not None
    tokenizer = open_tokenizer(found)
    match = "exact_match" in metrics and answered
    losses = bool({"loss", "perplexity"} & set(metrics))
    shots_for, shots = next((n for n in ("base", "model") if n in names), None), None
    if few_shot and shots_for and match:
        if train is None:
            raise KitError("worked examples come from training rows, and there are none", where="few_shot")
        shots = Shots.of(draw(train, few_shot, seed), style or few_shot_style(found, tokenizer))

    def use(name: str, model: Any) -> dict[str, dict[str, Any]]:
        stops = stop_ids(model, tokenizer)
        rows = [encode_pair(tokenizer, pair, stops) for pair in pairs]
        scores: dict[str, Any] = {}
        if match:
            scores |= _matches(model, tokenizer, pairs, rows, [r.prompt_ids for r in rows], max_new_tokens, batch_size)
        if losses:
            scores |= _loss(model, rows, batch_size)
        result = {name: scores}
        if shots and name == shots_for:
            prompts = [with_shots(tokenizer, pair, shots) for pair in pairs]
            extra = _matches(model, tokenizer, pairs, rows, prompts, max_new_tokens, batch_size, shots.stop_text)
            if losses and shots.style == "chat":  # lines have no end token, so their loss is not comparable
                chats = [Pair(shot_turns(p, shots), _as_turns(p), p.template) for p in pairs]
                extra |= _loss(model, [encode_pair(tokenizer, chat, stops) for chat in chats], batch_size)
            result[f"{name}_few_shot"] = extra
        return result

    parts = each_model(use, found, names, tokenizer, dtype=dtype, device=device)
    models = {name: scores for part in parts.values() for name, scores in part.items()}
    if most_frequent and match and train is not None:
        models["most_frequent"] = _most_frequent(train, pairs)
    result = {
        "rows": len(pairs),
        "data": origin,
        "models": models,
        "skipped": found.skipped | skipped,
        "settings": {
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "metrics": list(metrics),
            "few_shot": len(shots.pairs) if shots else 0,
            "style": shots.style if shots else None,
            "seed": seed,
            "quantized_base": found.quantized,
        },
    }
    path = output_path(found, out, EVAL)
    if path:
        write_json(path, result)
    return result | {"file": str(path) if path else None}


def _rows(source: Source, data: Any, train_data: Any) -> tuple[Any, Any, str]:
    """(training rows or None, rows to score, where these come from)."""
    train = read_rows(train_data) if train_data is not None else None
    if data is not None:
        if train is None and source.plan is not None:
            try:
                train = run_datasets(source.plan)[0]
            except KitError:
                train = None  # own data can be scored where the run's are gone
        return train, read_rows(data), str(data) if isinstance(data, str | Path) else "rows given"
    if source.plan is None:
        raise KitError("there are no rows to score", where="data", fix="give --data FILE.jsonl")
    planned, held_out = run_datasets(source.plan)
    if held_out is None or not len(held_out):
        raise KitError("the run holds out no rows", where="dataset", fix="give --data FILE.jsonl")
    return planned if train is None else train, held_out, "held-out rows of the run"


def _pairs(rows: Any, limit: int | None) -> tuple[list[Pair], dict[str, str]]:
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    first: KitError | None = None
    for index in range(len(rows)):
        if len(pairs) == limit:
            break
        try:
            pairs.append(as_pair(rows[index], index))
        except KitError as error:
            reasons[error.problems[0].problem] += 1
            first = first or error
    if not pairs:
        raise first or KitError("the data hold no rows", where="data")
    if len({pair.completion is None for pair in pairs}) > 1:
        raise KitError("some rows have an answer and some are plain text", where="data", fix="score them apart")
    return pairs, {reason: f"{count} rows" for reason, count in reasons.items()}


def _as_turns(pair: Pair) -> list[dict[str, Any]]:
    if isinstance(pair.completion, str):
        return [{"role": "assistant", "content": pair.completion}]
    return list(pair.completion or ())


def _matches(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    rows: Sequence[Encoded],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    stop_text: str | None = None,
) -> dict[str, Any]:
    answers = decode(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, stop_text=stop_text
    )
    correct = 0
    mistakes: list[dict[str, str]] = []
    for pair, row, answer in zip(pairs, rows, answers, strict=True):
        text = answer["text"].strip()
        # a template may add to an answer (an empty thinking block), so what was trained on counts as right too
        trained = tokenizer.decode(row.ids[row.start :], skip_special_tokens=True).strip()
        if answer["stopped"] and text in (pair.answer, trained):
            correct += 1
        elif len(mistakes) < MISTAKES:
            mistakes.append({"prompt": pair.question, "reference": pair.answer, "answer": text})
    return {
        "exact_match": correct / len(pairs),
        "correct": correct,
        "unstopped": sum(not a["stopped"] for a in answers),
        "mistakes": mistakes,
    }


def _loss(model: Any, rows: Sequence[Encoded], batch_size: int) -> dict[str, Any]:
    """Mean negative log-likelihood per answer token; rows longer than the model's context are left out, counted."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    usable = [row for row in rows if not context or len(row.ids) <= context]
    total, tokens = 0.0, 0
    for batch in _batches(model, usable, batch_size):
        nll, count = _nll(model, batch)
        total, tokens = total + nll, tokens + count
    loss = total / tokens if tokens else math.nan
    finite = math.isfinite(loss)
    return {
        "loss": loss if finite else None,
        "perplexity": math.exp(loss) if finite and loss < 700 else None,
        "tokens": tokens,
        "too_long": len(rows) - len(usable),
    }


def _batches(model: Any, rows: Sequence[Encoded], batch_size: int) -> list[list[Encoded]]:
    """Rows of like length together, no batch with more logits than LOGITS."""
    vocabulary = model.config.get_text_config().vocab_size
    batches: list[list[Encoded]] = []
    for row in sorted(rows, key=lambda r: -len(r.ids)):
        last = batches[-1] if batches else None
        if last is None or len(last) == batch_size or (len(last) + 1) * len(last[0].ids) * vocabulary > LOGITS:
            batches.append([row])
        else:
            last.append(row)
    return batches


def _nll(model: Any, batch: Sequence[Encoded]) -> tuple[float, int]:
    """(sum of the negative log-likelihoods, number) of the answer tokens of one batch, padded on the right."""
    import torch
    from torch.nn import functional

    width = max(len(row.ids) for row in batch)
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for n, row in enumerate(batch):
        length = len(row.ids)
        ids[n, :length] = torch.tensor(row.ids)
        mask[n, :length] = 1
        first = max(row.start, 1)  # nothing stands before the first token to foretell it
        labels[n, first:length] = torch.tensor(row.ids[first:])
    try:
        with torch.inference_mode():
            # use_cache=False: with a cache some attention paths treat the mask differently, and it costs memory
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            logits = logits[:, -width:]  # prompt tuning puts virtual tokens in front
            targets = labels[:, 1:].to(logits.device)
            nll = functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
            )
            return nll.double().sum().item(), int((targets != IGNORED).sum())
    except torch.OutOfMemoryError as error:
        raise KitError(
            f"{len(batch)} rows of {width} tokens do not fit into GPU memory",
            where="batch_size",
            fix="lower the batch size",
            code=ENVIRONMENT,
        ) from error


def _most_frequent(train: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for index, row in enumerate(train):
        try:
            pair = as_pair(row, index)
        except KitError:
            continue
        if pair.completion is not None:
            counts[pair.answer] += 1
    if not counts:
        return {"exact_match": None, "answer": None}
    answer, seen = counts.most_common(1)[0]
    correct = sum(pair.answer == answer for pair in pairs)
    share = seen / counts.total()
    return {"exact_match": correct / len(pairs), "correct": correct, "answer": answer, "share_of_training": share}


def format_table(result: dict[str, Any], width: int | None = None) -> str:
    """The scores as a table, one row per model."""
    columns = [m for m in METRICS if m in result["settings"]["metrics"]]
    header = ["model", *(c.replace("_", " ") for c in columns), "unstopped"]
    rows = []
    for name, scores in result["models"].items():
        label = name
        if name.endswith("_few_shot"):
            label = f"{name.removesuffix('_few_shot')} + {result['settings']['few_shot']} examples"
        elif name == "most_frequent":
            label = "most frequent answer"
        cells = [_cell(c, scores.get(c)) for c in columns]
        rows.append([label, *cells, str(scores.get("unstopped", "-"))])
    text = table(header, rows, width=width)
    notes = [f"{result['rows']} rows: {result['data']}"]
    long = max((s.get("too_long", 0) for s in result["models"].values()), default=0)
    if long:
        notes.append(f"{long} rows are longer than the model reads and have no part in the loss")
    notes += [f"not scored: {name}: {reason}" for name, reason in result["skipped"].items()]
    return text + "\n".join(notes) + "\n"


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric == "exact_match" else f"{value:.4f}"
