"""The edits that mend a DeepSpeed JSON, where there is one answer that keeps what the file means, or what it did.

An edit is always an answer to one finding; `mend` makes them one after the other and looks again after each, so that
nothing that could be mended is left.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kit.config.deepspeed import json_edit
from kit.config.deepspeed.check import accepts_auto, typed_params
from kit.config.deepspeed.filled_keys import TRAINER_SETTINGS
from kit.schema import fields
from kit.schema.dotted import value_at

DTYPES = {"float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
UNREAD = {  # conflicts in which DeepSpeed does not read the key, or refuses it where leaving it out changes nothing
    "zero_optimization.offload_param", "zero_optimization.offload_optimizer", "zero_optimization.compute_grad_norm",
    "zero_optimization.elastic_checkpoint", "zero_optimization.legacy_stage1",
    "tensor_parallel.dtype",
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """`what`: rename, replace, remove, remove-first or add; `value`: the new name or the new value."""

    what: str
    path: json_edit.KeyPath
    value: Any = None


@dataclass(frozen=True)
class Change:
    """One change of the text and why; `line` is that of the text before it, `keep` what to give the trainer now."""

    line: int
    key: str
    did: str
    why: str
    keep: str = ""


def apply_fixes(text: str, examine: Callable[[str], list[Any]]) -> tuple[str, list[Change]]:
    """The text with all that has one answer mended, and what was done. `examine`: findings.examine."""
    changes: list[Change] = []
    seen = {text}
    while finding := next((f for f in examine(text) if f.edits), None):
        for edit in finding.edits:
            text = apply_edit(text, edit)
        if text in seen:  # never met; an endless loop would be worse than a mistake left
            break
        seen.add(text)
        did = "; ".join(describe_edit(e) for e in finding.edits)
        changes.append(Change(finding.line, finding.key, did, finding.problem, finding.keep))
    return text, changes


def apply_edit(text: str, edit: Edit) -> str:
    if edit.what == "rename":
        return json_edit.rename_key(text, edit.path, edit.value)
    if edit.what == "replace":
        return json_edit.replace_value(text, edit.path, edit.value)
    if edit.what == "add":
        return json_edit.add_key(text, edit.path, edit.value)
    return json_edit.remove_key(text, edit.path, first=edit.what == "remove-first")


def describe_edit(edit: Edit) -> str:
    key = ".".join(edit.path)
    if edit.what == "rename":
        return f"{key} renamed to {edit.value}"
    if edit.what in ("remove", "remove-first"):
        return f"{key} removed" + (" (the first of them)" if edit.what == "remove-first" else "")
    return f"{key} {'added' if edit.what == 'add' else 'set'}: {shorten_json(edit.value)}"


def shorten_json(value: Any) -> str:
    """A value as JSON, cut short where it is long."""
    import json

    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def as_trainer_setting(key: str, value: Any) -> str:
    """What to give the trainer so that an "auto" becomes the value that stood there."""
    if key.endswith("betas") and isinstance(value, list) and len(value) == 2:
        return f"adam_beta1={shorten_json(value[0])}, adam_beta2={shorten_json(value[1])}"
    setting = TRAINER_SETTINGS[key]
    return f"{setting} = {shorten_json(value)}" if " " in setting else f"{setting}={shorten_json(value)}"


def edits_for(rule: str, path: json_edit.KeyPath, tree: dict[str, Any]) -> tuple[Edit, ...]:
    """The edits for one problem of check_deepspeed_json; none where they would be a guess."""
    holder = _holder(tree, path)
    if holder is None or (path[-1] not in holder and rule != "deepspeed"):
        return ()
    key, table, entry = ".".join(path), *field_at(path, tree)
    value = holder.get(path[-1])
    if rule == "deepspeed":
        return _conflict_edits(key, path, tree)
    if rule == "unknown-key":
        return _moving_edits(path, tree, table, value) or _rename_edits(path, holder, table, value)
    if value == "auto" and "alias" in entry and entry["alias"] not in holder:
        return (Edit("rename", path, entry["alias"]),)  # the name under which somebody fills it
    if rule == "renamed-key":
        return _deprecated_edits(path, holder, table, entry, value)
    if rule == "removed-key":
        off = value in (False, None, {}) or (isinstance(value, dict) and value.get("enabled") is False)
        gone = off or key == "amp" or (path[-1] == "mics_shard_size" and value == -1)  # fp16 and bf16 follow as "auto"
        return (Edit("remove", path),) if gone else ()
    if key in TRAINER_SETTINGS and entry.get("auto"):
        return (Edit("replace", path, "auto"),)
    if rule in ("kind", "choice", "auto", "zero-block"):
        return _value_edits(path, table, entry, value)
    return ()


def field_at(path: json_edit.KeyPath, tree: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The table that a key belongs to ("" where nothing is known of its block) and its entry (empty if unknown)."""
    table, typed = "deepspeed", typed_params(tree)
    for depth, key in enumerate(path[:-1], 1):
        inner = fields.field_tables().get(table, {}).get(key, {}).get("table", "")
        table = typed.get(".".join(path[:depth])) or inner
    return table, fields.field_tables().get(table, {}).get(path[-1], {})


def _holder(tree: Any, path: json_edit.KeyPath) -> dict[str, Any] | None:
    for key in path[:-1]:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else None


def _passes(table: str, key: str, value: Any) -> bool:
    """Whether the value would pass, were everything around it right."""
    return not [p for p in fields.check_fields(table, {key: value}) if p.rule != "missing-key"]


def _moving_edits(path: json_edit.KeyPath, tree: dict[str, Any], table: str, value: Any) -> tuple[Edit, ...]:
    """Edits for a key of another block: moved there, where it is not given as well; loss scaling for bf16 goes."""
    key, place = path[-1], fields.place_of_key(path[-1])
    if place is None or not table:
        return ()
    if path[:-1] == ("bf16",) and place[0] == "fp16":
        return (Edit("remove", path),)
    entry = fields.field_tables()[place[1]][key]
    names = tuple(place[0].split(".")) if place[0] else ()
    block = value_at(tree, place[0]) if place[0] else tree
    fits = _passes(place[1], key, value) or (value == "auto" and accepts_auto(entry))
    if not isinstance(block, dict) or key in block or not fits:
        return ()
    return Edit("add", (*names, key), value), Edit("remove", path)


def _rename_edits(path: json_edit.KeyPath, holder: dict[str, Any], table: str, value: Any) -> tuple[Edit, ...]:
    """An unknown key that is plainly a known one, which is not there as well."""
    key = path[-1]
    known = {name.lower(): name for name in fields.field_names(table)} if table else {}
    meant = fields.RENAMED["deepspeed"].get(key, "") if table == "deepspeed" else ""
    if meant not in known.values():
        close = difflib.get_close_matches(key.lower().replace("-", "_"), known, 2, 0.8)
        folded = [known[n] for n in close]
        ratios = [difflib.SequenceMatcher(None, key.lower(), n).ratio() for n in close]
        meant = folded[0] if folded and (len(folded) == 1 or ratios[0] > ratios[1] + 0.02) else ""
    if not meant or meant in holder:
        return ()
    entry = fields.field_tables()[table][meant]
    fits = _passes(table, meant, value) or (value == "auto" and accepts_auto(entry)) or (isinstance(value, dict) and
                                                                                "table" in entry)  # fmt: skip
    return (Edit("rename", path, meant),) if fits else ()


def _deprecated_edits(
    path: json_edit.KeyPath, holder: dict[str, Any], table: str, entry: dict[str, Any], value: Any
) -> tuple[Edit, ...]:
    """A deprecated name."""
    key, gone = path[-1], Edit("remove", path)
    offload = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
    if key in offload:
        new, pinned = offload[key], holder.get("cpu_offload_use_pin_memory")
        if value is not True:
            return (gone,) if value in (False, None) else ()
        if new in holder:  # DeepSpeed refuses the two together
            return (gone,) if value_at(holder, f"{new}.device") in ("cpu", "nvme") else ()
        block = {"device": "cpu"} | ({"pin_memory": pinned} if isinstance(pinned, bool) else {})
        return Edit("rename", path, new), Edit("replace", (*path[:-1], new), block)
    if key == "cpu_offload_use_pin_memory":
        blocks = [n for n in offload.values() if isinstance(holder.get(n), dict) and "pin_memory" not in holder[n]]
        moved = [Edit("add", (*path[:-1], n, "pin_memory"), value) for n in blocks] if isinstance(value, bool) else []
        return (*moved, gone)
    if key == "max_grad_norm":
        return (gone,)  # the engine refuses it; gradient_clipping is the trainer's
    new = str(entry["instead"]).split(" ")[0] if entry else fields.RENAMED["deepspeed"].get(key, "")
    if new not in fields.field_tables().get(table, {}) or not (entry or _passes(table, new, value)):
        return ()
    if new in holder:
        # The old bfloat16 is not read beside bf16; two spellings of one value are no choice either.
        return (gone,) if key == "bfloat16" or holder[new] == value else ()
    return (Edit("rename", path, new),)


def _conflict_edits(key: str, path: json_edit.KeyPath, tree: dict[str, Any]) -> tuple[Edit, ...]:
    if key == "fp16.enabled":
        return Edit("replace", path, "auto"), Edit("replace", ("bf16", "enabled"), "auto")
    if key in ("fp16.loss_scale_window", "fp16.min_loss_scale"):
        return (Edit("replace", path, 1),)
    return (Edit("remove", path),) if key in UNREAD else ()


def _value_edits(path: json_edit.KeyPath, table: str, entry: dict[str, Any], value: Any) -> tuple[Edit, ...]:
    """Another value of the right kind, or none: the key goes where its default is what happened anyway."""
    key, kinds = path[-1], entry.get("kinds", [])
    if path == ("zero_optimization",):
        staged = isinstance(value, int) and value in (0, 1, 2, 3)  # true was stage 1 in old files
        return (Edit("replace", path, {"stage": int(value)}),) if staged else ()
    block = fields.field_tables().get(str(entry.get("table")), {}) if kinds and "dict" in kinds else {}
    for new in _candidates(entry, kinds, block, value):
        if table and _passes(table, key, new) or (new == "auto" and accepts_auto(entry)):
            return (Edit("replace", path, new),)
    if entry.get("required") or not (value in ("auto", None) or (value is False and "device" in block)):
        return ()
    return (Edit("remove", path),)


def _candidates(entry: dict[str, Any], kinds: list[str], block: dict[str, Any], value: Any) -> list[Any]:
    """What the value may have meant, the likeliest first; each is tried against the table."""
    out: list[Any] = []
    if "enabled" in block and (isinstance(value, bool) or (value == "auto" and accepts_auto(block["enabled"]))):
        out.append({"enabled": value})
    if "device" in block and isinstance(value, str) and value != "auto":
        out.append({"device": value.lower()})
    if value is None and accepts_auto(entry):
        out.append("auto")
    if isinstance(value, str) and value != "auto":
        word = value.strip().lower()
        if "bool" in kinds and word in TRUE + FALSE:
            out.append(word in TRUE)
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            out += [int(number)] if number.is_integer() and "int" in kinds else [number]
        words = [c for c in entry.get("choices", ()) if isinstance(c, str)]
        out += [c for c in words if c.lower() == word]
        out += [DTYPES[word]] if DTYPES.get(word) in words else []
        out += [[value]] if "list" in kinds else []
    if isinstance(value, bool) and "int" in kinds and "choices" in entry:
        out.append(int(value))  # stage: true
    if isinstance(value, float) and math.isfinite(value) and "int" in kinds:
        whole = fields.round_up_from_zero(value)
        out.append("auto" if abs(value) < 1 and accepts_auto(entry) else whole)  # a share of the model's size
    if isinstance(value, int) and not isinstance(value, bool) and value in (0, 1) and "bool" in kinds:
        out.append(bool(value))
    return out
