"""What a model scores on held-out rows: exact match, loss and perplexity of the answers, beside plain baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.data.encode import Encoding, make_encoding
from kit.data.load import load_rows, load_run_datasets
from kit.data.templates import run_template
from kit.errors import KitError
from kit.evaluation.examples import (
    Example,
    FewShotPrompt,
    TokenizedExample,
    choose_few_shot_style,
    encode_few_shot_prompt,
    example_from_row,
    few_shot_messages,
    sample_rows,
    tokenize_example,
)
from kit.evaluation.generate import check_generation_settings, format_table_text
from kit.evaluation.loss import answer_loss
from kit.evaluation.sampling import generate_answers, stop_token_ids
from kit.models.inference import run_each_model
from kit.models.sources import ModelSource, choose_models, locate_models, open_source_tokenizer, output_path
from kit.rows.turns import RowProblem
from kit.storage.json_files import atomic_write_json

METRICS = ("exact_match", "loss", "perplexity")
EVAL_FILE = "eval.json"
MAX_MISTAKES = 5


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
    check_generation_settings(max_new_tokens=max_new_tokens, batch_size=batch_size)
    _check_metrics(metrics, limit)
    models = locate_models(source, base, revision)
    names = choose_models(models, which)
    train, held_out, origin = _load_rows(models, data, train_data)
    examples, skipped = _load_examples(held_out, limit)
    tokenizer = open_source_tokenizer(models)
    task = ScoringTask(
        tokenizer,
        examples,
        exact_match="exact_match" in metrics and examples[0].completion is not None,
        loss=bool({"loss", "perplexity"} & set(metrics)),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        trained=_encoding(models, tokenizer, as_trained=True),
        prompted=_encoding(models, tokenizer, as_trained=False),
    )
    few_shot_model, shots = next((n for n in ("base", "model") if n in names), None), None
    if few_shot and few_shot_model and task.exact_match:
        if train is None:
            problem = "worked examples come from training rows, and there are none"
            raise KitError(problem, "few_shot", "--few-shot 0, or a run whose training rows are here")
        shots = FewShotPrompt.from_rows(
            sample_rows(train, few_shot, seed), style or choose_few_shot_style(models, tokenizer)
        )

    def use(name: str, model: Any) -> dict[str, dict[str, Any]]:
        return _score(name, model, task, shots if name == few_shot_model else None)

    parts = run_each_model(use, models, names, tokenizer, dtype=dtype, device=device)
    scores = {name: score for part in parts.values() for name, score in part.items()}
    if most_frequent and task.exact_match and train is not None:
        scores["most_frequent"] = _most_frequent(train, examples)
    settings: dict[str, Any] = {"limit": limit, "max_new_tokens": max_new_tokens, "metrics": list(metrics)}
    settings |= {"few_shot": len(shots.examples) if shots else 0, "style": shots.style if shots else None}
    result = {
        "rows": len(examples),
        "data": origin,
        "models": scores,
        "skipped": models.skipped | skipped,
        "settings": settings | {"seed": seed, "quantized_base": models.quantized},
    }
    path = output_path(models, out, EVAL_FILE)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, result)
    return result | {"file": str(path) if path else None}


@dataclass(frozen=True)
class ScoringTask:
    """What every model of one evaluation is given, and which scores it gets."""

    tokenizer: Any
    examples: Sequence[Example]
    exact_match: bool
    loss: bool
    max_new_tokens: int
    batch_size: int
    trained: Encoding  # with the chat template that the run trained with
    prompted: Encoding  # with the tokenizer's own

    def tokenize(self, model: Any, examples: Sequence[Example]) -> list[TokenizedExample]:
        stops = stop_token_ids(model, self.tokenizer)
        return [tokenize_example(self.tokenizer, e, stops, self.trained, self.prompted) for e in examples]


def _check_metrics(metrics: Sequence[str], limit: int | None) -> None:
    for name in metrics:
        if name not in METRICS:
            raise KitError(
                f"the metric {name!r} is not known", where="metrics", fix=f"choose from {', '.join(METRICS)}"
            )
    if limit is not None and limit < 1:
        raise KitError(f"limit is {limit}", where="limit", fix="give at least 1")


def _encoding(models: ModelSource, tokenizer: Any, as_trained: bool) -> Encoding:
    """The encoding of rows as the run trained on them, or of prompts; with the run's date."""
    plan = models.plan or {}
    answers = (plan.get("trainer") or {}).get("assistant_only_loss")
    twin = as_trained and bool(answers) and (plan.get("dataset") or {}).get("train_on") is None
    return make_encoding(tokenizer, run_template(tokenizer, twin, (plan.get("tokenizer") or {}).get("date")))


def _score(name: str, model: Any, task: ScoringTask, shots: FewShotPrompt | None) -> dict[str, dict[str, Any]]:
    """Return {name: scores}, and with `shots` those behind worked examples as `name`_few_shot."""
    rows = task.tokenize(model, task.examples)
    scores: dict[str, Any] = {}
    if task.exact_match:
        scores |= _exact_match(model, task, rows, [row.prompt_ids for row in rows])
    if task.loss:
        scores |= answer_loss(model, rows, task.batch_size)
    if shots is None:
        return {name: scores}
    prompts = [encode_few_shot_prompt(task.tokenizer, example, shots) for example in task.examples]
    with_examples = _exact_match(model, task, rows, prompts, shots.stop_text)
    if task.loss and shots.style == "chat":  # lines have no end token, so their loss is not comparable
        chats = [Example(few_shot_messages(e, shots), _answer_messages(e), e.template) for e in task.examples]
        with_examples |= answer_loss(model, task.tokenize(model, chats), task.batch_size)
    return {name: scores, f"{name}_few_shot": with_examples}


def _load_rows(source: ModelSource, data: Any, train_data: Any) -> tuple[Any, Any, str]:
    """(training rows or None, rows to score, where these come from)."""
    train: Any = load_rows(train_data, "train_data") if train_data is not None else None
    if data is not None:
        if train is None and source.plan is not None:
            try:
                train = load_run_datasets(source.plan)[0]
            except KitError:
                train = None  # own data can be scored where the run's are gone
        return train, load_rows(data, "data"), str(data) if isinstance(data, str | Path) else "rows given"
    if source.plan is None:
        raise KitError("there are no rows to score", where="data", fix="give --data FILE.jsonl")
    planned, held_out = load_run_datasets(source.plan)
    if held_out is None or not len(held_out):
        raise KitError("the run holds out no rows", where="dataset", fix="give --data FILE.jsonl")
    return planned if train is None else train, held_out, "held-out rows of the run"


def _load_examples(rows: Any, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """(examples to score, {why rows are none: how many})."""
    examples: list[Example] = []
    reasons: Counter[str] = Counter()
    first: KitError | None = None
    for index in range(len(rows)):
        if len(examples) == limit:
            break
        try:
            examples.append(example_from_row(row_at(rows, index), index))
        except KitError as error:
            reasons[error.problems[0].problem] += 1
            first = first or error
    if not examples:
        raise first or KitError("the data hold no rows", "data", "give a file with rows")
    if len({example.completion is None for example in examples}) > 1:
        raise KitError("some rows have an answer and some are plain text", where="data", fix="score them apart")
    return examples, {reason: f"{count} rows" for reason, count in reasons.items()}


def row_at(rows: Any, index: int) -> Any:
    """A row, or what is wrong with it."""
    try:
        return rows[index]
    except RowProblem as problem:
        return problem


def _answer_messages(example: Example) -> list[dict[str, Any]]:
    if isinstance(example.completion, str):
        return [{"role": "assistant", "content": example.completion}]
    return list(example.completion or ())


def _exact_match(
    model: Any,
    task: ScoringTask,
    rows: Sequence[TokenizedExample],
    prompts: Sequence[list[int]],
    stop_text: str | None = None,
) -> dict[str, Any]:
    answers = generate_answers(
        model,
        task.tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        batch_size=task.batch_size,
        stop_text=stop_text,
    )
    correct = 0
    mistakes: list[dict[str, str]] = []
    for example, row, answer in zip(task.examples, rows, answers, strict=True):
        text = answer["text"].strip()
        # a template may add to an answer (an empty thinking block), so what was trained on counts as right too
        trained = task.tokenizer.decode(row.answer_ids, skip_special_tokens=True).strip()
        if answer["stopped"] and text in (example.answer, trained):
            correct += 1
        elif len(mistakes) < MAX_MISTAKES:
            mistakes.append({"prompt": example.question, "reference": example.answer, "answer": text})
    return {
        "exact_match": correct / len(task.examples),
        "correct": correct,
        "unstopped": sum(not answer["stopped"] for answer in answers),
        "mistakes": mistakes,
    }


def _most_frequent(train: Any, examples: Sequence[Example]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for index in range(len(train)):
        try:
            example = example_from_row(row_at(train, index), index)
        except KitError:
            continue
        if example.completion is not None:
            counts[example.answer] += 1
    if not counts:
        return {"exact_match": None, "answer": None}
    answer, count = counts.most_common(1)[0]
    correct = sum(example.answer == answer for example in examples)
    share = count / counts.total()
    return {"exact_match": correct / len(examples), "correct": correct, "answer": answer, "share_of_training": share}


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
        cells = [_format_score(c, scores.get(c)) for c in columns]
        rows.append([label, *cells, str(scores.get("unstopped", "-"))])
    text = format_table_text(header, rows, width=width)
    notes = [f"{result['rows']} rows: {result['data']}"]
    long = max((s.get("too_long", 0) for s in result["models"].values()), default=0)
    if long:
        notes.append(f"{long} rows are longer than the model reads and have no part in the loss")
    notes += [f"not scored: {name}: {reason}" for name, reason in result["skipped"].items()]
    return text + "\n".join(notes) + "\n"


def _format_score(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric == "exact_match" else f"{value:.4f}"
