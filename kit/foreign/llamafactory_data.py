"""LLaMA-Factory's data sets, named in a dataset_info.json, as the kit's dataset section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.foreign.data_sets import other_roles, refuse_other_method, section_of
from kit.foreign.read import read_config_file
from kit.foreign.report import Reading

MEDIA = ("images", "videos", "audios")
MEDIA_KEYS = ("media_dir", "visual_inputs", "freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels",
              "image_min_pixels", "video_max_pixels", "video_fps", "video_maxlen", "audio_sampling_rate")  # fmt: skip
JUDGED = ("chosen", "rejected", "kto_tag")
TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool",
        "function_tag": "tool_call"}  # fmt: skip
UNTIL = {"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"}


def split_list(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else str(value).split(",")
    return [str(w).strip() for w in listed if str(w).strip()]


def import_datasets(r: Reading) -> None:
    """Every set that `dataset` names, how they are mixed, what is in the loss, and the rows held out."""
    folder = r.get("dataset_dir", default="data")
    info, place = find_dataset_info(r, folder)
    if r.has("dataset_dir"):
        r.mark_default(("dataset_dir",), f"read: {place}" if place else "the paths of the data set say it")
    named = split_list(r.get("dataset")) if r.get("dataset") else []
    entries = {name: find_entry(name, folder, info) for name in named}
    pretraining = r.get("stage") == "pt"
    refuse_other_rows(r, entries)
    reasons = {name: why_not(name, entry, folder, place) for name, entry in entries.items()}
    carried = [name for name in entries if not reasons[name]]
    if r.has("dataset") and named:
        for number, name in enumerate(carried):
            import_entry(r, entries[name] or {}, place, section_of(number, len(carried)), pretraining)
        lost = [f"NOT carried: {reason}" for reason in reasons.values() if reason]
        if not carried:
            fix = "dataset.path=FILE, or give dataset_info.json beside the file"
            r.leave(("dataset",), "; ".join(lost) or "it names no data set", fix)
        else:
            r.recipe.notes += lost
            r.entries[("dataset",)].note = "; ".join([f"from {place}"] * bool(place) + lost)
    import_limit(r, [entries[name] or {} for name in carried])
    import_mixing(r, named, carried)
    import_held_out(r, info, place)
    import_loss(r, [is_text(entries[name] or {}, pretraining) for name in carried])


def find_dataset_info(r: Reading, folder: Any) -> tuple[dict[str, Any] | None, Path | None]:
    """dataset_info.json: in dataset_dir, from where one stands or beside the file; else in the file's own folder."""
    if not isinstance(folder, str) or folder == "ONLINE":
        return None, None
    beside = next(iter(r.sources.values())).folder
    for place in (Path(folder), beside / folder, beside):
        file = place / "dataset_info.json"
        try:
            if file.is_file():
                return read_config_file(file), file
        except (OSError, ValueError):
            continue
    return None, None


def find_entry(name: str, folder: Any, info: dict[str, Any] | None) -> dict[str, Any] | None:
    if folder == "ONLINE":
        return {"hf_hub_url": name}
    entry = (info or {}).get(name)
    return entry if isinstance(entry, dict) else None


def columns_of(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["columns"] if isinstance(entry.get("columns"), dict) else {}


def is_text(entry: dict[str, Any], pretraining: bool = False) -> bool:
    """Tell whether rows are plain text: an alpaca set without a response, and any that stage pt reads."""
    if pretraining:
        return True
    columns = columns_of(entry)
    return entry.get("formatting", "alpaca") == "alpaca" and bool(columns) and "response" not in columns


def refuse_other_rows(r: Reading, entries: dict[str, dict[str, Any] | None]) -> None:
    """Refuse preferences and media: the run is another kind of training."""
    for name, entry in entries.items():
        if entry and (entry.get("ranking") or any(columns_of(entry).get(c) for c in JUDGED)):
            refuse_other_method(r, f"the data set {name} holds preferences between answers", "dataset")
        if entry and (media := [c for c in MEDIA if columns_of(entry).get(c)]):
            refuse_other_method(r, f"the data set {name} holds {media[0]}", "dataset")
    switched = [key for key in MEDIA_KEYS if r.get(key) not in (None, False)]
    if switched and not (entries and all(entries.values())):
        refuse_other_method(r, f"{switched[0]} is given, so the rows hold images or sound", switched[0])
    r.mark_defaults(dict.fromkeys(["media_dir"], "no media here"))


def why_not(name: str, entry: dict[str, Any] | None, folder: Any, place: Path | None) -> str | None:
    """Why a named set cannot be carried."""
    if entry is None:
        there = f"{place} does not hold it" if place else f"none is in {folder}, nor beside the file"
        return f"{name} is a name in a dataset_info.json, and {there}"
    if isinstance(entry.get("hf_hub_url"), str) or isinstance(entry.get("file_name"), str):
        return None
    found = next((k for k in ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name") if entry.get(k)), None)
    where = {"ms_hub_url": "lies on ModelScope alone", "om_hub_url": "lies on openMind alone",
             "script_url": "is a script, which is not run", "cloud_file_name": "lies in a cloud store"}  # fmt: skip
    return f"{name} {where[found] if found else 'is neither a file nor a Hub id'}"


def dataset_path(entry: dict[str, Any], place: Path | None) -> str | None:
    if isinstance(entry.get("hf_hub_url"), str):
        return str(entry["hf_hub_url"])
    folder = place.parent if place else Path()
    return str(folder / str(entry["file_name"])) if isinstance(entry.get("file_name"), str) else None


def import_entry(r: Reading, entry: dict[str, Any], place: Path | None, to: str, pretraining: bool) -> None:
    """One entry of dataset_info.json."""
    path = ("dataset",)
    r.carry(path, f"{to}.path", dataset_path(entry, place))
    for name, key in (("subset", "name"), ("split", "split"), ("num_samples", "limit")):
        if entry.get(name):
            r.carry(path, f"{to}.{key}", entry[name])
    if entry.get("folder"):
        r.recipe.notes.append(f"NOT carried: the folder {entry['folder']} of {dataset_path(entry, place)}")
    columns = columns_of(entry)
    if is_text(entry, pretraining):
        r.carry(path, f"{to}.format", "text")
        ours = {"text": columns.get("prompt", "instruction" if pretraining else "text")}
    elif entry.get("formatting", "alpaca") == "alpaca":
        r.carry(path, f"{to}.format", "alpaca", "an empty line between instruction and input, there a line break")
        theirs = {"instruction": "prompt", "input": "query", "output": "response", "system": "system",
                  "history": "history", "tools": "tools"}  # fmt: skip
        ours = {name: columns[key] for name, key in theirs.items() if columns.get(key)}
    else:
        tags = entry["tags"] if isinstance(entry.get("tags"), dict) else {}
        openai = entry["formatting"] == "openai" or tags.get("role_tag") == "role"
        r.carry(path, f"{to}.format", "messages" if openai else "sharegpt")
        ours = {name: columns[name] for name in ("messages", "system", "tools") if columns.get(name)}
        import_tags(r, path, tags, to)
    for name, column in ours.items():
        if name != column:
            r.carry(path, f"{to}.columns.{name}", column)


def import_tags(r: Reading, path: tuple[str], tags: dict[str, Any], to: str) -> None:
    """What turns call their roles, and the keys that hold role and words."""
    roles = other_roles({str(tags[tag]): ours for tag, ours in TAGS.items() if tags.get(tag)})
    if roles:
        r.carry(path, f"{to}.roles", roles)
    odd = [
        f"{tags[tag]} for {known[0]}"
        for tag, known in (("role_tag", ("role", "from")), ("content_tag", ("content", "value")))
        if tags.get(tag) and tags[tag] not in known
    ]
    if odd:
        r.recipe.notes.append(f"NOT carried: turns that write {' and '.join(odd)}; rename the keys in the file")


def import_limit(r: Reading, entries: list[dict[str, Any]]) -> None:
    """max_samples is of each set."""
    most = r.get("max_samples")
    if not r.has("max_samples") or r.skip_null("max_samples"):
        return
    if not entries:
        r.carry(("max_samples",), "dataset.limit", most)
    for number, entry in enumerate(entries):
        own = entry.get("num_samples")
        limit = min(own, most) if isinstance(own, int) and isinstance(most, int) else most
        r.carry(("max_samples",), f"{section_of(number, len(entries))}.limit", limit)


def import_mixing(r: Reading, named: list[str], carried: list[str]) -> None:
    """mix_strategy and interleave_probs as weights; `concat` takes all rows of each."""
    strategy = str(r.get("mix_strategy", default="concat"))
    drawn = strategy in UNTIL and len(carried) > 1
    shares: list[Any] = [1.0] * len(named)
    if r.get("interleave_probs"):
        try:
            shares = [float(share) for share in split_list(r.get("interleave_probs"))]
        except ValueError:
            shares = []
    fit = len(shares) == len(named) and all(share > 0 for share in shares)
    key = "mix_strategy" if r.has("mix_strategy") else None
    probs = "interleave_probs" if r.has("interleave_probs") and not r.skip_null("interleave_probs") else None
    if drawn and fit:
        for number, name in enumerate(carried):
            weight = shares[named.index(name)]
            if (path := probs or key) is not None:
                r.carry((path,), f"dataset.mix.{number}.weight", weight)
        if key:
            r.carry((key,), "dataset.mix_until", UNTIL[strategy])
        return
    if key and not r.skip_null(key):
        if strategy in ("concat", "interleave_once") or len(named) < 2:
            r.mark_default((key,), "all rows of every set, once" if len(named) > 1 else "one data set")
        else:
            r.leave((key,), "NOT carried: it mixes sets that are not here", "dataset.mix, with a weight to each")
    if probs:
        if strategy not in UNTIL or len(named) < 2:
            r.mark_default((probs,), "not read: nothing is drawn by share")
        else:
            r.leave((probs,), "NOT carried: a share above 0 for each data set", "dataset.mix, with a weight to each")


def import_held_out(r: Reading, info: dict[str, Any] | None, place: Path | None) -> None:
    named = split_list(r.get("eval_dataset")) if r.get("eval_dataset") else []
    if r.has("eval_dataset") and named:
        found = [dataset_path(e, place) if isinstance(e := (info or {}).get(n), dict) else None for n in named]
        places = [p for p in found if p]
        if len(places) == len(named):
            note = "read in the form of the training rows"
            r.carry(("eval_dataset",), "dataset.eval_path", places[0] if len(places) == 1 else places, note)
        else:
            missing = ", ".join(name for name, p in zip(named, found, strict=True) if not p)
            reason = f"NOT carried: {missing}, of a dataset_info.json that is not here"
            r.leave(("eval_dataset",), reason, "dataset.eval_path=FILE")
    if r.has("val_size") and not r.skip_null("val_size"):
        size = r.get("val_size")
        if size:
            whole = isinstance(size, float) and size >= 1 and size.is_integer()
            r.carry(("val_size",), "dataset.test_size", int(size) if whole else size)
        else:
            r.mark_default(("val_size",), "nothing is held out, as here")


def import_loss(r: Reading, texts: list[bool]) -> None:
    """train_on_prompt and mask_history as dataset.train_on."""
    whole, last = r.get("train_on_prompt") is True, r.get("mask_history") is True
    if whole and last:
        raise KitError("train_on_prompt and mask_history exclude each other", r.name, "keep one")
    for name, on, mask, off in (
        ("train_on_prompt", whole, "everything", "prompts are not in the loss, as here"),
        ("mask_history", last, "last_turn", "every answer is trained, as here"),
    ):
        if r.has(name):
            if on:
                r.carry((name,), "dataset.train_on", mask)
            else:
                r.mark_default((name,), off)
    if not (whole or last) and not all(texts):
        r.recipe.default("dataset.train_on", "assistant_turns", "LLaMA-Factory trains the answers alone")
