"""The lines that read, split and write the rows, as kit/data/load.py does."""

from __future__ import annotations

from pathlib import Path

from kit.ejecting.text import assignment_lines, call_lines, literal
from kit.inspection import row_template
from kit.inspection.data_files import find_data_files
from kit.inspection.hub_dataset import SUFFIXES, has_data_suffix, split_suffixes
from kit.schema.run_plan import Dataset, RunPlan

COLUMNS = {"messages": ["messages"], "prompt_completion": ["prompt", "completion"], "text": ["text"]}  # what TRL reads


def held_out_lines(d: Dataset) -> int:
    """How many parts are held out: none, one that serves for both, or validation and test."""
    if d.eval_path or d.eval_split:
        return 1
    return 0 if not d.test_size else (1 if d.validation_size is None else 2)


def data_lines(plan: RunPlan, packed: bool) -> list[str]:
    """Reading, splitting and writing the rows, as kit/data/load.py does."""
    d = plan.dataset
    assert d.path is not None  # a mix is refused
    other = d.eval_path or d.eval_split
    functions, shape = rename_columns(d)
    lines = load_dataset_lines(
        "rows" if d.test_size and not other else "train", d, d.path or "", d.split, shape, packed
    )
    names = ["train", "validation", "test"][: 1 + held_out_lines(d)]
    if other:
        lines += load_dataset_lines(
            "validation", d, d.eval_path or d.path or "", d.split if d.eval_path else str(d.eval_split), shape, packed
        )
    elif d.test_size:
        out = d.test_size + (d.validation_size or 0)
        lines.append(f"parts = rows.train_test_split(test_size={out!r}, seed={d.seed})")
        if d.validation_size is None:
            lines.append('train, validation = parts["train"], parts["test"]')
        else:
            share = d.test_size / out if out < 1 else int(d.test_size)
            lines.append(f'rest = parts["test"].train_test_split(test_size={share!r}, seed={d.seed})')
            lines.append('train, validation, test = parts["train"], rest["train"], rest["test"]')
    for name in names:
        limit = d.limit if name == "train" else d.eval_limit
        if d.template:
            lines.append(f"{name} = prepare({name})")
        if limit and d.streaming:
            lines.append(f"{name} = {name}.take({limit})")
        elif limit:
            lines.append(f"{name} = {name}.select(range(min({limit}, len({name}))))")
    if plan.world_size > 1:
        lines = ["with args.main_process_first():", *(f"    {line}" if line else "" for line in lines)]
    return ["", *functions, "", "", *lines] if functions else lines


def load_dataset_lines(
    name: str, d: Dataset, path: str | list[str], split: str, shape: str, packed: bool
) -> list[str]:
    """`name = load_dataset(...)`, of files, a folder or a Hub id, with the columns that training needs."""
    place = Path(path) if isinstance(path, str) else None
    missing = place is not None and not place.exists() and has_data_suffix(place.name)
    found = [place] if place is not None and missing else find_data_files(path, split, d.name)
    if found:
        files = [str(f) for f in found]
        first = split_suffixes(found[0].name)[0]
        kind = SUFFIXES[first]
        alike = place is not None and place.is_dir() and sorted(place.glob("*" + first)) == found
        expression = f"sorted(glob({literal(str(place / ('*' + first)))}))" if place and alike else literal(files)
        given = [literal(kind), f"data_files={expression if len(files) > 1 else literal(files[0])}", 'split="train"']
        given += ['delimiter="\\t"'] if first == ".tsv" else []
    else:
        config, revision = (d.name, d.revision) if path == d.path else (None, None)
        given = [
            literal(path),
            *([literal(config)] if config else []),
            *assignment_lines({"revision": revision, "split": split}),
        ]
    given += ["streaming=True"] if d.streaming else []
    if shape.startswith("."):
        return call_lines(f"{name} = load_dataset(", given, packed, f"){shape}")
    lines = call_lines(f"{name} = load_dataset(", given, packed)
    return [*lines, f"{name} = {shape}({name})"]


def rename_columns(d: Dataset) -> tuple[list[str], str]:
    """Functions that the script needs for its columns, and what each part goes through when it is read."""
    if d.template:
        names = row_template.template_columns(d.template)
        return template_function_lines(d, names), f".select_columns({literal(names)})"
    rename = {theirs: ours for ours, theirs in d.columns.items() if theirs != ours}
    if d.format != "auto":
        targets = {d.columns.get(c, c): c for c in COLUMNS[d.format]}
        rename = {theirs: ours for theirs, ours in targets.items() if theirs != ours}
        return [], f".select_columns({literal(list(targets))})" + (
            f".rename_columns({literal(rename)})" if rename else ""
        )
    lines = ["def choose_columns(rows):"]
    if rename:
        clash = literal([ours for ours in rename.values() if ours not in rename])
        lines.append(f"    rows = rows.remove_columns([c for c in {clash} if c in rows.column_names])")
        lines.append(f"    rows = rows.rename_columns({literal(rename)})")
    lines.append(f"    known = {literal(list(COLUMNS.values()))}")
    lines.append("    return rows.select_columns(next(c for c in known if set(c) <= set(rows.column_names)))")
    return lines, "choose_columns"


def template_function_lines(d: Dataset, names: list[str]) -> list[str]:
    """`write`: one row in the format that is trained; `prepare`: a part without the rows that teach nothing."""
    lines = ["def write(row):", '    row = {name: "" if value is None else value for name, value in row.items()}']
    if row_template.template_format(d.template) == "messages":
        lines.append("    turns = [")
        for role in row_template.TURNS:
            if role in d.template:
                content = f"{literal(d.template[role])}.format(**row).strip()"
                lines.append(f'        {{"role": "{role}", "content": {content}}},')
        lines.append("    ]")
        if "system" in d.template:
            lines.append('    turns = [turn for turn in turns if turn["content"] or turn["role"] != "system"]')
        apart = d.format == "prompt_completion"
        row = '{"prompt": turns[:-1], "completion": turns[-1:]}' if apart else '{"messages": turns}'
        lines.append(f"    return {row}")
    else:
        items = [f"{literal(key)}: {literal(text)}.format(**row)" for key, text in d.template.items()]
        lines += [f"    {line}" for line in call_lines("return {", items, end="}")]
    learned = [k for k in row_template.TRAINED if k in d.template]
    taught = sorted({n for k in learned for _, n in row_template.template_parts(k, d.template[k]) if n})
    lines += ["", "", "def prepare(rows):"]
    if taught:
        lines.append(f"    learned = {literal(taught)}  # a row in which all of these are empty teaches nothing")
        lines.append(
            "    rows = rows.filter(lambda row: any(row[c] is not None and str(row[c]).strip() for c in learned))"
        )
    return [*lines, f"    return rows.map(write, remove_columns={literal(names)})"]
