"""Axolotl's `datasets:` and chat templates as the kit's dataset section."""

from __future__ import annotations

import re
from typing import Any

from kit.importing import prompts
from kit.importing.report import Reading
from kit.importing.tree import KeyPath

MASKS = (
    "roles drop_system_message message_field_training roles_to_train train_on_eos train_on_eot shards shards_idx "
    "field_tools field_thinking conversation input_transform"
).split()


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
    listed = r.get("datasets")
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        import_dataset(r, ("datasets", 0), listed[0])
        for number in range(1, len(listed)):
            r.leave(("datasets", number), "the kit trains on one data set", "join the files in one folder")
    test_sets = r.get("test_datasets")
    if isinstance(test_sets, list) and test_sets and isinstance(test_sets[0], dict):
        place = dataset_place(test_sets[0])
        if place and "path" in test_sets[0]:
            r.carry(("test_datasets", 0, "path"), "dataset.eval_path", place)
            if test_sets[0].get("data_files") == place and r.has("test_datasets", 0, "data_files"):
                r.mark_default(("test_datasets", 0, "data_files"), "the file of eval_path")
        if "split" in test_sets[0] and test_sets[0].get("path") == (listed or [{}])[0].get("path"):
            r.carry(("test_datasets", 0, "split"), "dataset.eval_split", test_sets[0]["split"])
            r.recipe.drop("dataset.eval_path", "a split of the same data set")
        for name in ("type", "ds_type", "field_messages"):
            if r.has("test_datasets", 0, name) and (listed or [{}])[0].get(name) == test_sets[0][name]:
                r.mark_default(("test_datasets", 0, name), "as the training rows")
    if r.has("val_set_size") and not r.skip_null("val_set_size"):
        if r.get("val_set_size"):
            r.carry(("val_set_size",), "dataset.test_size", r.get("val_set_size"))
        else:
            r.mark_default(("val_set_size",), "nothing is held out, as here")


def dataset_place(block: dict[str, Any]) -> str | None:
    files = block.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, str) and block.get("path") in ("json", "csv", "parquet", "arrow", "text", files):
        return files
    return block.get("path")


def import_dataset(r: Reading, prefix: KeyPath, block: dict[str, Any]) -> None:
    """The data set that is trained on: its place, and its rows written as the kit's template writes them."""
    place = dataset_place(block)
    if r.has(*prefix, "path"):
        if place != block["path"]:
            r.mark_default((*prefix, "path"), "the suffix of the file says it")
        else:
            r.carry((*prefix, "path"), "dataset.path", place)
    if r.has(*prefix, "data_files") and not r.skip_null(*prefix, "data_files"):
        if place and place != block.get("path"):
            r.carry((*prefix, "data_files"), "dataset.path", place)
        else:
            r.leave((*prefix, "data_files"), "one file or folder", "dataset.path=FILE")
    r.carry_all({"name": "dataset.name", "split": "dataset.split", "revision": "dataset.revision"}, *prefix)
    r.mark_defaults(
        {"ds_type": "the suffix of the file says it", "preprocess_shards": "a matter of memory there"}, *prefix
    )
    if r.has(*prefix, "trust_remote_code"):
        r.leave_all({"trust_remote_code": ("data sets run no code here", "")}, *prefix)
    import_row_format(r, prefix, block)
    for name in MASKS:
        if r.has(*prefix, name):
            usual = (name == "roles_to_train" and block[name] == ["assistant"]) or (
                name in ("train_on_eos", "train_on_eot") and block[name] == "turn"
            )
            if usual or block[name] in (None, False, [], {}):
                r.mark_default((*prefix, name), "the same here")
            else:
                r.leave((*prefix, name), "the template's marks say what is trained", "a template of your own")


def import_row_format(r: Reading, prefix: KeyPath, block: dict[str, Any]) -> None:
    kind = block.get("type")
    whole = r.get("train_on_inputs") is True
    path = (*prefix, "type")
    base = str(kind).split(":")[0].split(".")[0] if isinstance(kind, str) else kind
    if isinstance(kind, dict):
        import_own_format(r, path, kind)
    elif base == "completion":
        r.carry(path, "dataset.format", "text")
        if r.has(*prefix, "field") and not r.skip_null(*prefix, "field"):
            r.carry((*prefix, "field"), "dataset.columns.text", block["field"])
    elif base in ("chat_template", "sharegpt"):
        r.carry(path, "dataset.format", "messages")
        column = block.get("field_messages") or ("conversations" if base == "sharegpt" else "messages")
        if r.has(*prefix, "field_messages") and not r.skip_null(*prefix, "field_messages"):
            r.carry((*prefix, "field_messages"), "dataset.columns.messages", column)
        elif column != "messages":
            r.carry(path, "dataset.columns.messages", column)
        import_turn_keys(r, prefix, block)
        if not r.skip_null(*prefix, "chat_template"):
            import_chat_template(r, (*prefix, "chat_template"))
        if not whole:
            r.recipe.default("trainer.assistant_only_loss", True, "Axolotl trains the assistant's words alone")
    elif base == "alpaca" and str(kind) in ("alpaca", "alpaca:instruct", "alpaca:chat"):
        text_template = prompts.ALPACA_CHAT if kind == "alpaca:chat" else prompts.ALPACA
        r.carry(path, "dataset.template", text_template, prompts.NO_INPUT)
    elif kind is not None and r.has(*path):
        r.leave(path, f"rows of type {kind} are not known here", "write dataset.template.prompt and .completion")
    if r.has("train_on_inputs"):
        if whole and base in ("chat_template", "sharegpt", "completion"):
            r.mark_default(("train_on_inputs",), "the loss is on every token of such rows, as here")
        elif whole:
            r.carry(("train_on_inputs",), "trainer.completion_only_loss", False)
        else:
            r.mark_default(("train_on_inputs",), "prompts are not in the loss, as here")


def import_turn_keys(r: Reading, prefix: KeyPath, block: dict[str, Any]) -> None:
    """Names inside a turn: role and content, or from and value, which TRL renames itself."""
    given = block.get("message_property_mappings")
    names = {**given} if isinstance(given, dict) else {}
    for old, new in (("message_field_role", "role"), ("message_field_content", "content")):
        if isinstance(block.get(old), str):
            names[new] = block[old]
    usual = {("role", "role"), ("content", "content"), ("role", "from"), ("content", "value")}
    for name in ("message_property_mappings", "message_field_role", "message_field_content"):
        if r.has(*prefix, name) and not r.skip_null(*prefix, name):
            if all(pair in usual for pair in names.items()):
                r.mark_default((*prefix, name), "role and content, or from and value, are read by themselves")
                if "from" in names.values():
                    r.recipe.notes.append(
                        "turns with from and value often say human and gpt: the chat template must know these names, "
                        "else rename them to user and assistant in the file"
                    )
            else:
                r.leave((*prefix, name), "turns hold role and content, or from and value", "rename them in the file")


def import_own_format(r: Reading, path: KeyPath, kind: dict[str, Any]) -> None:
    """A prompt of one's own, `format: "{instruction} {input}"`, as the kit's template."""
    columns = {n: kind.get(f"field_{n}") or n for n in ("instruction", "input", "output", "system")}
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
            r.carry((*path, name), "dataset.template", template)
    r.leave_all({"no_input_format": ("one form for every row", "leave empty inputs out of the data")}, *path)
