"""Axolotl's `datasets:` and chat templates as the kit's dataset section."""

from __future__ import annotations

import re
from typing import Any

from kit.foreign import prompts
from kit.foreign.data_sets import (
    COPY_IT,
    KNOWN_ROLES,
    REMOTE,
    ROLES,
    carry_place,
    carry_split,
    file_or_place,
    no_place,
    one_mask,
    other_roles,
    refuse_other_method,
    section_of,
)
from kit.foreign.report import Reading
from kit.foreign.tree import KeyPath

CHATS = ("chat_template", "chat_template.default", "sharegpt", "sharegpt:chat")
PROMPTS = {"alpaca": "alpaca_prompt", "alpaca:instruct": "alpaca_prompt"}
OF_CHATS = ("field_messages", "message_property_mappings", "message_field_role", "chat_template", "roles")
TURN_WEIGHTS = ("weight", "train", "training")  # a turn's own word on whether it is trained
NO_COUNTERPART = {
    "drop_system_message": ("the system turn stays", "take it out of the data"),
    "message_field_training_detail": ("whole turns are trained, or not", "a weight of 0 or 1 on each turn"),
    "split_thinking": ("the template says where the reasoning stands", "reasoning_content in the data"),
    "shards": ("no shards of a data set", "dataset.limit"),
    "shards_idx": ("no shards of a data set", "dataset.limit"),
    "conversation": ("the tokenizer's template writes the turns", "tokenizer.chat_template=NAME or FILE.jinja"),
    "input_transform": ("a config names no code here", "change the data beforehand"),
    "chat_template_jinja": ("a template is a file here", "write it to my.jinja; tokenizer.chat_template=my.jinja"),
    "input_format": ("one form for every row", ""),
    "trust_remote_code": ("data sets run no code here", ""),
    "field_human": ("turns hold their role", ""),
    "field_model": ("turns hold their role", ""),
    "temperature": ("for distillation", ""),
    "logprobs_field": ("for distillation", ""),
}


def import_chat_template(r: Reading, path: KeyPath) -> None:
    if not r.has(*path) or r.skip_null(*path):
        return
    name = str(r.get(*path))
    if name in ("tokenizer_default", "jinja") or name.startswith("tokenizer_default_fallback_"):
        r.mark_default(path, "the tokenizer's own template" if name != "jinja" else "chat_template_jinja holds it")
    elif name == "chatml":
        r.carry(path, "tokenizer.chat_template", "chatml")
    else:
        r.leave(path, "the tokenizer's own template is used, and what Axolotl calls so may differ",
                f"tokenizer.chat_template={name} if kit check knows it, or FILE.jinja")  # fmt: skip


def import_datasets(r: Reading) -> None:
    """Every set that is trained on, what is in the loss, and the rows held out."""
    listed = r.get("datasets")
    blocks = (
        {("datasets", n): b for n, b in enumerate(listed) if isinstance(b, dict)} if isinstance(listed, list) else {}
    )
    reasons = {path: why_not(block) for path, block in blocks.items()}
    carried = {path: block for path, block in blocks.items() if not reasons[path]}
    for path, reason in reasons.items():
        if reason and r.has(*path):
            r.leave(path, f"NOT carried: {reason[0]}", reason[1])
    whole = r.get("train_on_inputs") is True
    mask = one_mask(wanted_mask(block, whole) for block in carried.values())
    for number, (path, block) in enumerate(carried.items()):
        import_dataset(r, path, block, section_of(number, len(carried)), mask)
    import_loss(r, [row_kind(block) for block in carried.values()], mask)
    import_test_datasets(r, list(carried.values()))
    import_long_rows(r, [row_kind(block) for block in carried.values()])
    if r.has("val_set_size") and not r.skip_null("val_set_size"):
        if r.get("val_set_size"):
            r.carry(("val_set_size",), "dataset.test_size", r.get("val_set_size"))
        else:
            r.mark_default(("val_set_size",), "nothing is held out, as here")


def row_kind(block: dict[str, Any]) -> str:
    """chat, pair, text or tokenized, by the set's type; "" for one that is not known."""
    kind = block.get("type")
    if isinstance(kind, dict):
        return "pair"
    name = str(kind).removeprefix("axolotl.prompt_strategies.")
    if kind in (None, ""):
        return "" if any(block.get(key) for key in OF_CHATS) else "tokenized"
    return (
        "chat" if name in CHATS else "text" if name == "completion" else "pair"
        if name in PROMPTS or name == "alpaca:chat" else ""
    )  # fmt: skip


def why_not(block: dict[str, Any]) -> tuple[str, str] | None:
    """Why a set cannot be carried, and what to do; None where it can."""
    place = file_or_place(block)
    if place is None:
        return no_place(block)
    if any(REMOTE.match(str(p)) for p in (place if isinstance(place, list) else [place])):
        return f"{place} is not on this machine and no Hub id", COPY_IT
    if not row_kind(block):
        kind = block.get("type")
        if any(
            word in str(kind) for word in ("ultra", "argilla", "intel", "bradley_terry", "orpo", "kto", "stepwise")
        ):
            return f"rows of type {kind} are judged answers, not text to train on", "the preferred answers alone"
        fix = "dataset.path=FILE, and dataset.format=... or dataset.template.prompt and .completion"
        return f"rows of {f'type {kind}' if kind else 'chats without a type'} are not known here", fix
    return None


def wanted_mask(block: dict[str, Any], whole: bool) -> str | None:
    """dataset.train_on as this set is trained there; None where every token is anyway."""
    kind = row_kind(block)
    if kind in ("text", "tokenized"):
        return None
    if whole:
        return "everything"
    if kind == "pair":
        return "completion"
    roles = block.get("roles_to_train", ["assistant"])
    if not roles and block.get("message_field_training") in TURN_WEIGHTS:
        return "chosen_turns"
    if not roles and not block.get("train_on_eos", "turn"):
        return "last_turn"
    return "assistant_turns"


def import_dataset(r: Reading, prefix: KeyPath, block: dict[str, Any], to: str, mask: str | None) -> None:
    """One data set: its place, the form of its rows, what is trained of them."""
    carry_place(r, prefix, block, to)
    carry_split(r, (*prefix, "split"), to)
    for name, reason in {"ds_type": "the suffix of the file says it",
                         "preprocess_shards": "a matter of memory there"}.items():  # fmt: skip
        if r.has(*prefix, name):
            r.mark_default((*prefix, name), reason)
    import_row_format(r, prefix, block, to)
    import_turn_masks(r, prefix, block, mask)
    r.leave_all(NO_COUNTERPART, *prefix)


def import_row_format(r: Reading, prefix: KeyPath, block: dict[str, Any], to: str) -> None:
    path, kind, name = (*prefix, "type"), row_kind(block), block.get("type")
    if isinstance(name, dict):
        import_own_format(r, path, name, to)
    elif kind == "tokenized":
        if r.has(*path):
            r.carry(path, f"{to}.format", "tokenized", "no type: input_ids and labels")
        else:
            r.recipe.default(f"{to}.format", "tokenized", "Axolotl reads input_ids where a set has no type")
    elif kind == "text":
        r.carry(path, f"{to}.format", "text")
        if r.has(*prefix, "field") and not r.skip_null(*prefix, "field"):
            r.carry((*prefix, "field"), f"{to}.columns.text", block["field"])
    elif name in PROMPTS:
        r.carry(path, f"{to}.format", PROMPTS[str(name)],
                "the answer stands right behind '### Response:', there on a line of its own")  # fmt: skip
    elif name == "alpaca:chat":
        r.carry(path, f"{to}.template", prompts.ALPACA_CHAT, prompts.NO_INPUT)
    elif kind == "chat":
        names = turn_names(block)
        shared = "from" in names.values() or str(name).startswith("sharegpt")
        r.carry(path, f"{to}.format", "sharegpt" if shared else "messages")
        for key, ours in (("field_messages", "messages"), ("field_tools", "tools"), ("field_system", "system")):
            if r.has(*prefix, key) and not r.skip_null(*prefix, key):
                if block[key] == ours:
                    r.mark_default((*prefix, key), "found by itself")
                else:
                    r.carry((*prefix, key), f"{to}.columns.{ours}", block[key])
        import_turn_keys(r, prefix, names)
        import_roles(r, (*prefix, "roles"), to)
        if not r.skip_null(*prefix, "chat_template"):
            import_chat_template(r, (*prefix, "chat_template"))


def turn_names(block: dict[str, Any]) -> dict[str, Any]:
    """Ours to theirs of the keys inside a turn."""
    given = block.get("message_property_mappings")
    names = {**given} if isinstance(given, dict) else {}
    for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
        if isinstance(block.get(old), str):
            names[new] = block[old]
    return names


def import_turn_keys(r: Reading, prefix: KeyPath, names: dict[str, Any]) -> None:
    usual = {("role", "role"), ("content", "content"), ("role", "from"), ("content", "value")}
    usual |= {(key, key) for key in ("name", "tool_calls", "tool_call_id", "reasoning_content", "weight")}
    odd = [f"{theirs} as {ours}" for ours, theirs in names.items() if (ours, str(theirs)) not in usual]
    for name in ("message_property_mappings", "message_field_role", "message_field_content"):
        if r.has(*prefix, name) and not r.skip_null(*prefix, name):
            if odd:
                r.leave((*prefix, name), f"turns hold role and content, or from and value, not {', '.join(odd)}",
                        "rename them in the file")  # fmt: skip
            else:
                r.mark_default((*prefix, name), "role and content, or from and value, are read by themselves")
    for name, known in (("field_thinking", ("reasoning_content", "reasoning", "thinking")),
                        ("template_thinking_key", ("reasoning_content",))):  # fmt: skip
        if r.has(*prefix, name) and not r.skip_null(*prefix, name):
            if r.get(*prefix, name) in known:
                r.mark_default((*prefix, name), "reasoning is found by itself")
            else:
                r.leave((*prefix, name), "the kit reads and hands on reasoning_content", "rename it in the file")


def import_roles(r: Reading, path: KeyPath, to: str) -> None:
    """`roles: {user: [human], ...}` as dataset.roles."""
    if not r.has(*path) or r.skip_null(*path):
        return
    given = r.get(*path)
    pairs = {
        str(theirs): str(ours)
        for ours, listed in (given.items() if isinstance(given, dict) else ())
        for theirs in (listed if isinstance(listed, list) else [listed])
    }
    if not isinstance(given, dict) or any(ours not in ROLES for ours in pairs.values()):
        r.leave(path, f"a role is one of {', '.join(ROLES)}", "dataset.roles.THEIRS=user")
    elif odd := other_roles(pairs):
        r.carry(path, f"{to}.roles", odd)
    else:
        r.mark_default(path, "these are known")


def import_turn_masks(r: Reading, prefix: KeyPath, block: dict[str, Any], mask: str | None) -> None:
    """Which turns of a set are trained, where dataset.train_on says the same of all."""
    roles = block.get("roles_to_train")
    ours = {KNOWN_ROLES.get(str(role), str(role)) for role in roles} if isinstance(roles, list) else set()
    own = wanted_mask(block, False)
    if r.has(*prefix, "roles_to_train"):
        if mask == own and (ours == {"assistant"} or own != "assistant_turns"):
            r.carry((*prefix, "roles_to_train"), "dataset.train_on", mask)
        elif mask == "everything" or row_kind(block) != "chat":
            r.mark_default((*prefix, "roles_to_train"), "not read: train_on_inputs, or no chats")
        else:
            r.leave((*prefix, "roles_to_train"), "the same turns of all sets", "dataset.train_on=...")
    if r.has(*prefix, "message_field_training") and not r.skip_null(*prefix, "message_field_training"):
        if block["message_field_training"] in TURN_WEIGHTS:
            r.mark_default((*prefix, "message_field_training"), "a turn's own weight is read")
        else:
            fix = "rename it to weight in the file"
            r.leave((*prefix, "message_field_training"), f"a turn's weight is {' or '.join(TURN_WEIGHTS)}", fix)
    for name in ("train_on_eos", "train_on_eot"):
        if r.has(*prefix, name):
            if block[name] in (None, "turn") or not block[name]:
                r.mark_default((*prefix, name), "the end of a trained turn is trained, as here")
            else:
                r.leave((*prefix, name), "the end of a turn is trained with it", "")


def import_loss(r: Reading, kinds: list[str], mask: str | None) -> None:
    if r.has("train_on_inputs") and not r.skip_null("train_on_inputs"):
        if r.get("train_on_inputs") is not True:
            r.mark_default(("train_on_inputs",), "prompts are not in the loss, as here")
        elif mask == "everything":
            note = "the words of the template too" if "chat" in kinds else ""
            r.carry(("train_on_inputs",), "dataset.train_on", "everything", note)
        else:
            r.mark_default(("train_on_inputs",), "the loss is on every token of such rows, as here")
    if mask and mask != "everything":
        r.recipe.default("dataset.train_on", mask, "Axolotl trains the assistant's words alone")


def import_test_datasets(r: Reading, trained: list[dict[str, Any]]) -> None:
    """What is evaluated: files, a Hub id, or another split of the one set that is trained on."""
    listed = r.get("test_datasets")
    blocks = {n: b for n, b in enumerate(listed) if isinstance(b, dict)} if isinstance(listed, list) else {}
    alike = ("path", "type", "ds_type", "name", "field", "field_messages", "message_property_mappings", "data_files")
    places = []
    for number, block in blocks.items():
        prefix, place = ("test_datasets", number), file_or_place(block)
        first = trained[0] if trained else {}
        of_same = len(trained) == len(blocks) == 1 and place == file_or_place(first)
        if place is None or not isinstance(place, str):
            continue
        key = "path" if place == block.get("path") else "data_files"
        if of_same and block.get("split"):
            if r.has(*prefix, "split"):
                r.carry((*prefix, "split"), "dataset.eval_split", block["split"])
        elif r.has(*prefix, key):
            places.append(place)
            r.carry((*prefix, key), "dataset.eval_path", places[0] if len(places) == 1 else list(places))
            if block.get("split") == "train" and r.has(*prefix, "split"):
                r.mark_default((*prefix, "split"), "all rows of the file")
        for name in alike:
            same = trained and all(name in b and b[name] == block.get(name) for b in trained)
            if r.has(*prefix, name) and (same or name in ("path", "data_files", "ds_type")):
                r.mark_default((*prefix, name), "as the training rows" if same else "the suffix of the file says it")


def import_long_rows(r: Reading, kinds: list[str]) -> None:
    """What becomes of rows longer than sequence_len."""
    words = {"drop": "drop", "truncate": "truncate", "raise": "refuse"}
    given = r.get("excess_length_strategy")
    if r.has("excess_length_strategy") and isinstance(given, str) and given in words:
        r.carry(("excess_length_strategy",), "dataset.on_long_row", words[given])
    elif kinds and set(kinds) == {"text"}:
        r.recipe.default("dataset.on_long_row", "split", "Axolotl cuts the rows of a completion set into pieces")
    elif kinds:
        r.recipe.default("dataset.on_long_row", "drop", "Axolotl drops rows longer than sequence_len")


def refuse_other_rows(r: Reading) -> None:
    """Refuse runs on images and sound."""
    if r.get("processor_type"):
        refuse_other_method(r, f"processor_type {r.get('processor_type')} is of images or sound", "processor_type")


def import_own_format(r: Reading, path: KeyPath, kind: dict[str, Any], to: str) -> None:
    """A prompt of one's own, `format: "{instruction} {input}"`, as the kit's template."""
    columns = {n: str(kind.get(f"field_{n}") or n) for n in ("instruction", "input", "output", "system")}
    text = str(kind.get("format") or "{instruction} {input} ")
    head = (
        str(kind.get("system_format") or "{system}").replace("{system}", str(kind["system_prompt"]))
        if kind.get("system_prompt")
        else ""
    )
    fill = re.compile(r"\{(instruction|input|system)\}")
    text = "".join(
        "{" + columns[part] + "}" if number % 2 else part.replace("{", "{{").replace("}", "}}")
        for number, part in enumerate(fill.split(text))
    )
    prompt = head.replace("{", "{{").replace("}", "}}") + text
    template = {"prompt": prompt, "completion": "{" + columns["output"] + "}"}
    own_keys = {*(f"field_{n}" for n in columns), "format", "system_prompt", "system_format"}
    for name in kind:
        if name in own_keys and r.has(*path, name) and not r.skip_null(*path, name):
            r.carry((*path, name), f"{to}.template", template)
    r.leave_all({"no_input_format": ("one form for every row", "leave empty inputs out of the data")}, *path)
