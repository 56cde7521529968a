"""Rows of a data set as question and answer, and both as token ids, the way the training tokenizes them.

A row is {"messages": [...]}, {"prompt", "completion"} (text or messages) or {"text"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import KitError, first_line
from kit.models.sources import Source

SEPARATORS = ("\n", "\n\n", "\n\n###\n\n")  # between worked examples: the first that no example holds
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One row: `completion` is None for plain text, which has no answer of its own."""

    prompt: str | Turns
    completion: str | Turns | None
    template: dict[str, Any] = field(default_factory=dict)  # tools and other arguments of the chat template

    @property
    def question(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt.strip()
        return "\n".join(content_text(m) for m in self.prompt if m.get("role") != "system").strip()

    @property
    def answer(self) -> str:
        if isinstance(self.completion, str):
            return self.completion.strip()
        return "\n".join(content_text(m) for m in self.completion or ()).strip()


@dataclass(frozen=True)
class Encoded:
    """Token ids of a whole row; the answer is `ids[start:]`, `prompt_ids` is what generation starts from."""

    prompt_ids: list[int]
    ids: list[int]
    start: int


@dataclass(frozen=True)
class Shots:
    """Worked examples to stand before a question."""

    pairs: tuple[Pair, ...]
    style: str
    separator: str

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], style: str) -> Shots:
        if style not in ("chat", "text"):
            raise KitError(f"the style {style!r} of worked examples is not known", where="style", fix="chat or text")
        pairs = tuple(as_pair(row, i, "few_shot") for i, row in enumerate(rows))
        if any(pair.completion is None for pair in pairs):
            raise KitError("plain text rows have no answer to show as a worked example", where="few_shot")
        texts = [t for pair in pairs for t in (pair.question, pair.answer)]
        separator = next((s for s in SEPARATORS if not any(s in t for t in texts)), SEPARATORS[-1])
        return cls(pairs, style, separator)

    @property
    def stop_text(self) -> str | None:
        # a base that continues lines does not end its answer, it goes on to the next example
        return self.separator if self.style == "text" else None


def content_text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""


def as_pair(row: dict[str, Any], index: int, where: str = "data") -> Pair:
    """A row as question and answer: of a chat the last assistant turn is the answer. KitError for any other row."""
    place = f"{where}, row {index + 1}"
    if not isinstance(row, dict):
        raise KitError("a row is not a JSON object", where=place)
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError:
        raise KitError("tools is not JSON", where=place) from None
    template = {**(row.get("chat_template_kwargs") or {}), **({"tools": tools} if tools else {})}
    messages = row.get("messages")
    if messages:
        _check_turns(messages, place)
        last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
        if not last:
            raise KitError("a chat has no assistant turn after a question", where=place)
        return Pair(list(messages[:last]), [messages[last]], template)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is not None and completion is not None:
        if isinstance(prompt, str) and isinstance(completion, str):
            return Pair(prompt, completion)
        _check_turns(prompt, place)
        _check_turns(completion, place)
        return Pair(list(prompt), list(completion), template)
    if isinstance(row.get("text"), str):
        return Pair(row["text"], None)
    raise KitError(
        f"a row has the columns {', '.join(map(str, row)) or '(none)'}",
        where=place,
        fix='give "messages", "prompt" and "completion", or "text"',
    )


def _check_turns(turns: Any, place: str) -> None:
    if not isinstance(turns, list) or not turns or any(not isinstance(m, dict) or "role" not in m for m in turns):
        raise KitError("a chat is not a list of messages with role and content", where=place)


def read_rows(data: str | Path | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a .jsonl file (or a .json list), or the rows given; KitError with the line that is wrong."""
    if not isinstance(data, str | Path):
        rows = list(data)
    else:
        path = Path(data).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise KitError(f"{path} cannot be read: {error}", where="data") from None
        if path.suffix == ".json":
            rows = _parse(text, f"{path}")
            if not isinstance(rows, list):
                raise KitError(f"{path} does not hold a list", where="data")
        else:
            lines = enumerate(text.split("\n"), 1)  # not splitlines(): U+2028 may stand inside a JSON string
            rows = [_parse(line, f"{path}:{n}") for n, line in lines if line.strip()]
    if not rows:
        raise KitError("the data hold no rows", where="data")
    return rows


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise KitError(f"not JSON: {error}", where=place) from None


def render_ids(tokenizer: Any, turns: Turns, template: dict[str, Any], *, opening: bool) -> list[int]:
    """A chat as token ids, `opening` with the header of the next assistant turn; KitError where it does not render."""
    if not getattr(tokenizer, "chat_template", None):
        raise KitError(
            "a chat was given, but the tokenizer has no chat template",
            where="tokenizer",
            fix="give text, or a tokenizer with a chat template",
        )
    try:
        encoded = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, add_generation_prompt=opening, **template
        )
    except Exception as error:  # noqa: BLE001 - jinja errors and whatever a template raises
        raise KitError(f"the chat template refuses a chat: {first_line(error)}", where="chat") from error
    return list(encoded["input_ids"])


def encode_prompt(
    tokenizer: Any,
    prompt: str | Turns,
    *,
    chat: bool,
    system: str | None = None,
    template: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids that an answer is to follow; text is a user turn where `chat`, else it is continued as it is."""
    if isinstance(prompt, str) and not chat:
        if system:
            raise KitError("a system prompt needs a chat", where="system", fix="put it into the prompt")
        return _open_ended(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    _check_turns(turns, "prompts")
    if system and turns[0].get("role") != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return render_ids(tokenizer, turns, template or {}, opening=True)


def _open_ended(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    # some tokenizers close every text with eos, after which nothing is left to continue
    if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        ids = [start] if start is not None else []
    if not ids:
        raise KitError("a prompt is empty", where="prompts")
    return ids


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after an assistant turn, where it differs from eos (ChatML's end).

    None without a template or where the turn ends in plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "answer7"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}], tokenize=False
        )
    except Exception:  # noqa: BLE001 - a template may refuse such a chat for reasons of its own
        return None
    after = tokenizer(text.rsplit(mark, 1)[-1], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return after[0] if after and after[0] in special else None


def encode_pair(tokenizer: Any, pair: Pair, stops: Sequence[int]) -> Encoded:
    """A row as token ids, its answer ending with the end token.

    The answer starts where prompt and whole row part, as in TRL: templates and tokenizers may treat the seam
    differently with and without an answer. What a template puts behind the end token (a newline) is nobody's answer.
    """
    if pair.completion is None:
        assert isinstance(pair.prompt, str)
        ids = _closed(tokenizer, pair.prompt)
        return Encoded(ids[:1], ids, 0)
    if isinstance(pair.prompt, str):
        assert isinstance(pair.completion, str)
        prompt_ids, ids = _open_ended(tokenizer, pair.prompt), _closed(tokenizer, pair.prompt + pair.completion)
    else:
        prompt_ids = render_ids(tokenizer, pair.prompt, pair.template, opening=True)
        ids = render_ids(tokenizer, [*pair.prompt, *pair.completion], pair.template, opening=False)
    start = next((n for n, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), None)
    start = min(len(prompt_ids), len(ids)) if start is None else start
    if not isinstance(pair.prompt, str):
        end = max((n for n in range(start, len(ids)) if ids[n] in set(stops)), default=len(ids) - 1)
        ids = ids[: end + 1]
    return Encoded(prompt_ids, ids, start)


def _closed(tokenizer: Any, text: str) -> list[int]:
    eos = tokenizer.eos_token
    return list(tokenizer(text if not eos or text.endswith(eos) else text + eos)["input_ids"])


def few_shot_style(source: Source, tokenizer: Any) -> str:
    """ "chat" where the base itself knows chats, else "text": a base without chat training follows lines better."""
    folder = source.base or source.folder
    if source.base is None:
        return "chat" if getattr(tokenizer, "chat_template", None) else "text"
    if (folder / "chat_template.jinja").is_file():
        return "chat"
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "text"
    return "chat" if config.get("chat_template") else "text"


def shot_turns(pair: Pair, shots: Shots) -> Turns:
    """The prompt of a row as a chat, the worked examples as earlier turns behind its system prompt."""
    turns = [{"role": "user", "content": pair.prompt}] if isinstance(pair.prompt, str) else list(pair.prompt)
    lead = 1 if turns[0].get("role") == "system" else 0
    examples: Turns = []
    for shot in shots.pairs:
        examples.append({"role": "user", "content": shot.question})
        examples.append({"role": "assistant", "content": shot.answer})
    return [*turns[:lead], *examples, *turns[lead:]]


def with_shots(tokenizer: Any, pair: Pair, shots: Shots, *, system: str | None = None) -> list[int]:
    """Token ids of a prompt behind worked examples, as earlier turns or as lines of question and answer."""
    if shots.style == "chat":
        return encode_prompt(tokenizer, shot_turns(pair, shots), chat=True, system=system, template=pair.template)
    lines = [f"{shot.question} {shot.answer}" for shot in shots.pairs] + [pair.question]
    turns = pair.prompt if isinstance(pair.prompt, list) else []
    header = system or next((content_text(m) for m in turns if m.get("role") == "system"), "")
    return _open_ended(tokenizer, shots.separator.join([header, *lines] if header else lines))


def draw(rows: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows chosen with a fixed seed, all of them where there are fewer."""
    return [rows[i] for i in random.Random(seed).sample(range(len(rows)), min(count, len(rows)))]
