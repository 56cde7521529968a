"""Batched generation: padded on the left, ended by every token that ends an answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from kit.data.encode import end_of_turn_id
from kit.errors import ENVIRONMENT, KitError


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: generation_config's, the tokenizer's and the chat template's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ids = [*ids, tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return sorted({int(i) for i in ids if i is not None})


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    seed: int = 0,
    stop_text: str | None = None,
) -> list[dict[str, Any]]:
    """[{text, tokens, stopped}] for token-id prompts, in their order.

    Batches are padded on the left, since a decoder-only model continues at the right edge; `tokens` end with the stop
    token where there was one and hold no padding. `stop_text` ends an answer too and is cut off the text.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    stops = stop_token_ids(model, tokenizer)
    # a model's own sampling defaults and penalties would otherwise fill in what is not set here
    model.generation_config = GenerationConfig(eos_token_id=stops or None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    device = model.get_input_embeddings().weight.device
    torch.manual_seed(seed)
    answers: list[dict[str, Any]] = [{} for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together; the widest first
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        if width >= context:
            raise KitError(
                f"a prompt has {width} tokens and the model reads {context}", where="prompts", fix="shorten it"
            )
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch], device=device)
        config = GenerationConfig(
            max_new_tokens=min(max_new_tokens, context - width),
            eos_token_id=stops or None,
            pad_token_id=pad,
            use_cache=True,  # a fully tuned model may have been saved with the training's `false`
            **_sampling_settings(temperature, top_p),
        )
        criteria = StoppingCriteriaList([_stop_text_criterion(tokenizer, stop_text, width)] if stop_text else [])
        try:
            with torch.inference_mode():
                sequences = model.generate(
                    input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=criteria
                )
        except torch.OutOfMemoryError as error:
            raise KitError(
                f"{len(batch)} prompts at once do not fit into GPU memory",
                where="batch_size",
                fix="lower the batch size",
                code=ENVIRONMENT,
            ) from error
        for i, row in zip(batch, sequences[:, width:].tolist(), strict=True):
            answers[i] = _cut_answer(tokenizer, row, set(stops), stop_text)
    return answers


def _sampling_settings(temperature: float, top_p: float | None) -> dict[str, Any]:
    if temperature <= 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0 if top_p is None else top_p}


def _cut_answer(tokenizer: Any, tokens: list[int], stops: set[int], stop_text: str | None) -> dict[str, Any]:
    end = next((n for n, token in enumerate(tokens) if token in stops), None)
    kept = tokens if end is None else tokens[: end + 1]
    text = tokenizer.decode(kept if end is None else kept[:-1], skip_special_tokens=True)
    stopped = end is not None
    if stop_text and stop_text in text.lstrip():
        lead = len(text) - len(text.lstrip())  # a break before the answer does not end it
        text, stopped = text[: text.index(stop_text, lead)], True
        kept = next(
            (kept[:n] for n in range(1, len(kept)) if _contains_stop_text(tokenizer, kept[:n], stop_text)), kept
        )
    return {"text": text, "tokens": kept, "stopped": stopped}


def _contains_stop_text(tokenizer: Any, tokens: list[int], stop_text: str) -> bool:
    return stop_text in tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


def _stop_text_criterion(tokenizer: Any, stop_text: str, width: int) -> Callable[..., Any]:
    """Make a stopping criterion: the new text of a row, behind `width` tokens of prompt, holds `stop_text`.

    transformers' `stop_strings` cannot stand in for it: StopStringCriteria also ends an answer at a separator that
    stands before its first word, where a base often begins, and it matches across the end of the prompt.
    """
    import torch

    def is_done(input_ids: Any, scores: Any, **_: Any) -> Any:
        done = [_contains_stop_text(tokenizer, row, stop_text) for row in input_ids[:, width:].tolist()]
        return torch.tensor(done, device=input_ids.device)

    return is_done
