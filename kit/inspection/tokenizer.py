"""What can be known of a tokenizer without loading it: its tokens, its special tokens, its chat template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from kit.errors import KitError, Problem, with_rule
from kit.schema.run_plan import Model, Tokenizer
from kit.storage import hub_cache, safetensors_header
from kit.storage.json_files import read_json
from kit.system import paths

FAST, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
OTHERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "chat_templates")
ROLES = ("pad_token", "eos_token", "bos_token")
# Classes without special tokens of their own: what their files do not name does not exist.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
CONTROL_TOKEN = re.compile(
    r"<\|[\w.]+\|>|<｜[^｜<>\s]+｜>|<(?:start|end)_of_turn>|\[/?[A-Z_]{3,}\]"
)  # in chat templates


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's files as they lie on the disk."""

    folder: Path
    tokens: dict[str, int] | None  # token to id; None where only a sentencepiece model or nothing is here
    special: set[int]
    roles: dict[str, str | None]  # pad_token, eos_token, bos_token; one that is absent here cannot be known
    template: str | None  # None: no chat template

    @cached_property
    def size(self) -> int:
        """The highest id plus one: as many rows an embedding needs."""
        return max((self.tokens or {}).values(), default=-1) + 1


@dataclass
class TokenizerReport:
    """What the tokenizer section means for the run."""

    files: TokenizerFiles | None = None
    new_tokens: list[str] = field(default_factory=list)  # of added_tokens, those that the vocabulary lacks
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    writes_date: bool | None = None  # whether the chat template writes today's date; None where it is not here


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """The tokenizer in a folder, None where there is none; KitError where a file is damaged."""
    names = [FAST, CONFIG, *OTHERS]
    if not any(next(folder.glob(name), None) for name in names):
        return None
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    mapping = read_json(folder / MAP) if (folder / MAP).is_file() else {}
    roles: dict[str, str | None] = {}
    for role in ROLES:
        given = config.get(role, mapping.get(role))
        if given is not None or role in config or config.get("tokenizer_class") in PLAIN_CLASSES:
            roles[role] = given["content"] if isinstance(given, dict) else given
    tokens: dict[str, int] | None = None
    special: set[int] = set()
    if (folder / FAST).is_file():
        tokens, special = read_vocabulary(folder / FAST)
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named = [*roles.values(), *(extra if isinstance(extra, list) else [])]
        for token in [t["content"] if isinstance(t, dict) else t for t in named]:
            if isinstance(token, str) and token not in tokens:  # transformers adds what a role names and is not there
                tokens[token] = max(tokens.values(), default=-1) + 1
                special.add(tokens[token])
    given = config.get("chat_template")
    if isinstance(given, list):
        given = next((t.get("template") for t in given if t.get("name") == "default"), "")
    if given is None and any((folder / name).exists() for name in TEMPLATES):
        file = folder / TEMPLATES[0]
        given = file.read_text(encoding="utf-8") if file.is_file() else ""
    return TokenizerFiles(folder, tokens, special, roles, given)


def read_vocabulary(path: Path) -> tuple[dict[str, int], set[int]]:
    """Token to id, and the ids of special tokens, from a tokenizer.json; KitError where it is damaged."""
    content = read_json(path)
    try:
        model = content["model"]
        # A Unigram model lists [piece, score] pairs in the order of their ids.
        vocabulary = model["vocab"]
        tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {p[0]: i for i, p in enumerate(vocabulary)}
        added = content.get("added_tokens") or []
        tokens.update({t["content"]: int(t["id"]) for t in added})
        return tokens, {int(t["id"]) for t in added if t.get("special")}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise KitError(
            f"{path} is not a tokenizer: {type(error).__name__} {error}", fix="fetch the file again"
        ) from None


# ---- chat templates ----


def is_file_name(template: str) -> bool:
    """Whether tokenizer.chat_template means a file; else it is a name."""
    return "/" in template or template.endswith((".jinja", ".j2"))


def trl_templates() -> Path | None:
    """TRL's folder of chat templates, found without importing TRL; None where TRL is not installed."""
    try:
        spec = find_spec("trl")
    except ModuleNotFoundError:  # an import hook may say no in its own way
        return None
    places = (spec and spec.submodule_search_locations) or []
    return next((f for p in places if (f := Path(p, "chat_templates")).is_dir()), None)


def named_templates() -> dict[str, Path]:
    """Every template that can be named: the kit's own, and TRL's where it is installed."""
    folders = [f for f in (trl_templates(), paths.CONF / "tokenizer") if f]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.jinja"))}


def find_chat_template(template: str) -> Path:
    """The file of a named template or of a path; KitError where there is none."""
    if is_file_name(template):
        path = Path(template).expanduser()
        if not path.is_file():
            raise KitError(f"there is no file {template}", "tokenizer.chat_template", "check the path")
        return path
    known = named_templates()
    if template in known:
        return known[template]
    close = difflib.get_close_matches(template, known, 3, 0.5)
    names = sorted(n for n in known if not n.endswith("_training"))
    raise KitError(
        f"there is no chat template named {template!r}",
        "tokenizer.chat_template",
        f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(names)}, or a .jinja file",
    )


def fitting_templates(tokens: Collection[str]) -> list[str]:
    """Names of the chat templates whose control tokens a vocabulary has, the most demanding first, at most three."""
    fits: list[tuple[int, str]] = []
    for name, file in named_templates().items():
        if name.endswith("_training"):
            continue
        needed = set(CONTROL_TOKEN.findall(file.read_text(encoding="utf-8")))
        if needed and needed <= set(tokens):
            fits.append((-len(needed), name))
    return [name for _, name in sorted(fits)[:3]]


def advise_template(tokens: Collection[str] | None) -> str:
    """What to do about a tokenizer without a chat template, in the words of a fix."""
    names = fitting_templates(tokens) if tokens else []
    if names:
        others = f", as are those of {', '.join(names[1:])}" if names[1:] else ""
        return f"tokenizer.chat_template={names[0]} (its tokens are in the vocabulary{others}), or FILE.jinja"
    named = "tokenizer.chat_template=NAME (a template of TRL's, e.g. llama3)"
    return f"tokenizer=chatml adds one with its tokens; or {named} or FILE.jinja"


# ---- the section `tokenizer` of a run ----


def examine_tokenizer(t: Tokenizer, model: Model, rows: int | None, chat: bool) -> TokenizerReport:
    """Look at the tokenizer of a run; problems name dotted keys.

    rows: of the base's embedding (config.json's vocab_size), None where that is not known. chat: the data are chats.
    """
    report = TokenizerReport()
    name = t.name_or_path or model.name_or_path
    revision = t.revision or (model.revision if t.name_or_path is None else None)
    folder = safetensors_header.find_model_folder(name, revision)
    if folder is None and t.name_or_path and not hub_cache.is_hub_id(t.name_or_path):
        problem, fix = f"there is no tokenizer folder {name}", "check the path, or give a Hub id"
        report.problems.append(Problem(problem, "tokenizer.name_or_path", fix, "tokenizer-files"))
    if folder is not None:
        try:
            report.files = read_tokenizer_files(folder)
        except KitError as error:
            key = "tokenizer.name_or_path"
            report.problems += [Problem(p.problem, key, p.fix, "tokenizer-files") for p in error.problems]
            return report
        if report.files is None and Path(name).expanduser().is_dir():  # a snapshot in the cache may be a part only
            key = "tokenizer.name_or_path" if t.name_or_path else "model.name_or_path"
            text = f"{name} holds no tokenizer"
            report.problems.append(Problem(text, key, "tokenizer.name_or_path=FOLDER or Hub id", "tokenizer-files"))
    _look_at_template(report, t, chat)
    _look_at_tokens(report, t, name, rows)
    return report


def _look_at_template(report: TokenizerReport, t: Tokenizer, chat: bool) -> None:
    text = report.files.template if report.files else None
    if t.chat_template:
        try:
            text = find_chat_template(t.chat_template).read_text(encoding="utf-8")
        except KitError as error:
            if trl_templates() is None and not is_file_name(t.chat_template):
                report.notes.append(f"chat template {t.chat_template}: TRL, which ships it, is not installed here")
            else:
                report.problems += with_rule(error.problems, "chat-template-name")
            return
        except (OSError, UnicodeDecodeError) as error:
            problem, key = f"the chat template cannot be read: {error}", "tokenizer.chat_template"
            report.problems.append(Problem(problem, key, "check the file", "chat-template-name"))
            return
    elif chat and report.files and text is None:
        report.problems.append(
            Problem(
                f"the data are chats, and the tokenizer in {report.files.folder} has no chat template",
                "tokenizer.chat_template",
                advise_template(report.files.tokens),
                "chat-template",
            )
        )
    if text is not None:
        report.writes_date = "strftime_now" in text


def _look_at_tokens(report: TokenizerReport, t: Tokenizer, name: str, rows: int | None) -> None:
    for token in t.added_tokens:
        if not token.strip() or t.added_tokens.count(token) > 1:
            problem = f"added token {token!r} is {'blank' if not token.strip() else 'listed twice'}"
            fix = "list each token once"
            report.problems.append(Problem(problem, "tokenizer.added_tokens", fix, "added-tokens"))
    files = report.files
    if files is None or files.tokens is None:
        report.new_tokens = list(t.added_tokens)
        return
    report.new_tokens = [token for token in t.added_tokens if token not in files.tokens]
    size = files.size + len(report.new_tokens)
    if t.added_tokens and not report.new_tokens:
        report.notes.append("every added token is in the vocabulary already: nothing is added, their rows stay")
    for role in ROLES:
        named = getattr(t, role)
        if named and named not in files.tokens and named not in t.added_tokens:
            close = difflib.get_close_matches(named, [k for k in files.tokens if k[:1] == named[:1]], 3, 0.6)
            fix = f"did you mean {' or '.join(close)}? " if close else ""
            problem = f"{role} {named!r} is not among the {files.size:,} tokens of {name}"
            fix += f"Or add it: tokenizer.added_tokens=['{named}']"
            report.problems.append(Problem(problem, f"tokenizer.{role}", fix, "special-token"))
    pad, eos = (getattr(t, role) or files.roles.get(role, "") for role in ("pad_token", "eos_token"))
    for role, given, reason in (
        ("pad_token", pad, "name one that the data never holds, e.g. a reserved token"),
        ("eos_token", eos, "name one: without it a tuned model would never stop"),
    ):
        if given is None:
            problem = f"the tokenizer of {name} has no {role}, and none is guessed"
            fix = f"tokenizer.{role}=...: {reason}"
            report.problems.append(Problem(problem, f"tokenizer.{role}", fix, "special-token-missing"))
    if pad and pad == eos:
        report.notes.append(
            f"pad_token and eos_token are both {pad}: this trainer masks padding by position, so end tokens stay in "
            "the loss; a collator that masks by id would drop them"
        )
    if rows is None:
        return
    used = {pad, eos, t.bos_token}
    surplus = {k: i for k, i in files.tokens.items() if i >= rows}
    refused = sorted(k for k, i in surplus.items() if i not in files.special or k in used)
    if refused and not report.new_tokens:
        report.problems.append(
            Problem(
                f"the tokenizer has {files.size:,} tokens, the base's embedding {rows:,} rows: "
                f"{', '.join(map(repr, refused[:3]))}{' ...' if len(refused) > 3 else ''} would have none",
                "tokenizer.name_or_path",
                "use the tokenizer that belongs to the model, or list the tokens in tokenizer.added_tokens",
                "vocabulary",
            )
        )
    elif surplus and not report.new_tokens:
        report.notes.append(
            f"the embedding has {rows:,} rows, none for {', '.join(sorted(surplus)[:3])}: text that holds them cannot "
            "be trained on"
        )
    if report.new_tokens:
        grown = f"grows from {rows:,} to {size:,} rows" if size > rows else f"has room for them in its {rows:,} rows"
        count = len(report.new_tokens)
        report.notes.append(f"{count} token{'s are' if count > 1 else ' is'} added; the embedding {grown}")
