"""DeepSpeed and FSDP as TrainingArguments, accelerate and Axolotl hold them (transformers training_args.py)."""

from __future__ import annotations

from pathlib import Path

from kit.foreign.report import Reading
from kit.foreign.tree import KeyPath


def import_sharding(r: Reading) -> None:
    """deepspeed and fsdp as TrainingArguments holds them."""
    import_deepspeed_file(r)
    if r.has("fsdp") and not r.skip_null("fsdp"):
        given = r.get("fsdp")
        words = given.split() if isinstance(given, str) else given
        if words in (False, [], True) or not isinstance(words, list):
            if words is True:
                r.carry(("fsdp",), "fsdp.version", 2)
            else:
                r.mark_default(("fsdp",), "off, as here")
        else:
            import_fsdp_words(r, [str(w) for w in words])
    if isinstance(r.get("fsdp_config"), dict):
        import_fsdp_config(r, "fsdp_config")
    elif r.has("fsdp_config") and not r.skip_null("fsdp_config"):
        r.leave(("fsdp_config",), "a path", "give that file to kit import, or write its keys under fsdp:")


def import_deepspeed_file(r: Reading, *path: str | int) -> None:
    path = path or ("deepspeed",)
    if not r.has(*path) or r.skip_null(*path):
        return
    value = r.get(*path)
    if isinstance(value, dict):
        r.carry(path, "deepspeed", value)
    elif isinstance(value, str) and value:
        where = locate_file(r, path, value)
        note = "" if where else "the file is not here; the kit's own are deepspeed=zero1, zero2, zero3, ..._offload"
        r.carry(path, "deepspeed.file", where or value, note)
    else:
        r.mark_default(path, "off, as here")


def locate_file(r: Reading, path: KeyPath, name: str) -> str | None:
    """The path as it is found: from where one stands, else beside the file that names it."""
    for place in (Path(name).expanduser(), r.source(path).folder / name):
        try:
            if place.is_file():
                return str(place)
        except (OSError, ValueError):
            return None
    return None


FSDP_KEYS = (
    "activation_checkpointing auto_wrap_policy backward_prefetch cpu_offload cpu_ram_efficient_loading "
    "forward_prefetch min_num_params reshard_after_forward state_dict_type sync_module_states "
    "transformer_layer_cls_to_wrap use_orig_params version"
).split()
FSDP_OTHER = {
    "offload_params": "cpu_offload",
    "backward_prefetch_policy": "backward_prefetch",
    "fsdp_version": "version",
    "sharding_strategy": "reshard_after_forward",
}
STRATEGIES = ["full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2"]


def import_fsdp_config(r: Reading, *prefix: str | int) -> None:
    """A block of FSDP settings, with or without the prefix fsdp_, as transformers' fsdp_config."""
    block = r.get(*prefix)
    version = block.get("fsdp_version", block.get("version", 2 if r.format != "accelerate" else 1))
    for name in list(block):
        if not isinstance(name, str) or not r.has(*prefix, name) or r.skip_null(*prefix, name):
            continue
        path, value, plain = (*prefix, name), block[name], name.removeprefix("fsdp_")
        key = FSDP_OTHER.get(name) or FSDP_OTHER.get(plain, plain)
        if plain == "sharding_strategy":
            word = STRATEGIES[value - 1] if isinstance(value, int) and 1 <= value <= 5 else str(value).lower()
            whole = {"full_shard": True, "shard_grad_op": False}
            if version == 2 and word in whole:
                r.carry(path, "fsdp.reshard_after_forward", whole[word])
            elif version == 2:
                r.leave(path, f"FSDP 2 has no {word}", "fsdp.version=1")
            else:
                r.carry(path, "fsdp.reshard_after_forward", word)
        elif key in FSDP_KEYS:
            r.carry(path, f"fsdp.{key}", value)
        elif key == "limit_all_gathers" and value in (True, "true"):
            r.mark_default(path, "what torch does by itself")
        else:
            r.leave(
                path, "transformers' fsdp_config has no such key", "keep it for a script of your own: launch.script"
            )
    if "version" not in block and "fsdp_version" not in block:
        r.recipe.default("fsdp.version", version, f"{r.format}'s default")


def import_fsdp_words(r: Reading, words: list[str]) -> None:
    config = r.get("fsdp_config") or {}
    version = config.get("fsdp_version", config.get("version", 1)) if isinstance(config, dict) else 1
    known_words = {*STRATEGIES, "auto_wrap", "offload"}
    if odd := [w for w in words if w not in known_words]:
        r.leave(("fsdp",), f"not known: {' '.join(odd)}", "fsdp.reshard_after_forward=..., fsdp.cpu_offload=true")
        return
    r.carry(("fsdp",), "fsdp.version", version)
    for word in words:
        if word == "offload":
            r.carry(("fsdp",), "fsdp.cpu_offload", True)
        elif word in STRATEGIES:
            r.carry(("fsdp",), "fsdp.reshard_after_forward", word == "full_shard" if version == 2 else word)
