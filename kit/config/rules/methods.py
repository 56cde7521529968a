"""The rules of single PEFT methods: the arithmetic of their sizes with the base's, and what cannot be trained here.

PEFT raises all of it once the base is loaded, a few in the first step. Ranges of single fields stand in
kit/schema/fields.json; kit/config/rules/table.py lists the rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kit.config.rules.adapter import names_module
from kit.config.rules.context import RuleContext, Violations
from kit.inspection import architectures
from kit.schema import fields

OWN_KEYS = ("base_model_name_or_path", "peft_version", "auto_mapping")  # PEFT writes them itself


def method(run: RuleContext) -> tuple[str, dict[str, Any]]:
    """The PEFT method, "" for full fine-tuning, and its settings."""
    peft = run.plan["peft"] or {}
    return str(peft.get("peft_type", "")).upper(), peft


def nothing_trains(run: RuleContext) -> Violations:
    kind, peft = method(run)
    for name in OWN_KEYS:
        if peft.get(name) is not None:
            yield f"PEFT sets {name} itself", f"peft.{name}", f"remove peft.{name}"
    if kind and peft.get("inference_mode"):
        text = "inference_mode freezes the adapter: there is nothing to train"
        yield text, "peft.inference_mode", "peft.inference_mode=false"
    targets = peft.get("target_modules")
    if targets is not None and not targets and not peft.get("target_parameters") and kind:
        key = "peft.target_modules"
        yield (
            "target_modules is empty: there is nothing to train",
            key,
            f"{key}=all-linear, or '{key}=[q_proj,v_proj]'",
        )


def value(run: RuleContext, key: str) -> Any:
    """A setting of the method, or PEFT's default for it."""
    kind, peft = method(run)
    return fields.field_default(kind, key) if peft.get(key) is None else peft[key]


def arithmetic(run: RuleContext) -> Violations:
    """Yield sizes that do not fit each other, or not the matrices that the method is put on."""
    kind, peft = method(run)
    if not kind or any(p.rule in ("kind", "range") and "peft." in p.where for p in run.report.problems):
        return
    yield from among_themselves(run, kind, peft)
    shapes = targeted_shapes(run)
    for name, (rows, columns) in sorted(shapes.items()):
        for problem, key in against_a_matrix(run, kind, rows, columns):
            yield f"{name} is {rows} x {columns}: {problem}", f"peft.{key}", fitting(run, kind, key, shapes)
            return  # the others say the same


def among_themselves(run: RuleContext, kind: str, peft: dict[str, Any]) -> Violations:
    """Yield settings of a method that exclude or need each other."""
    for method_name, one, other in (("OFT", "r", "oft_block_size"), ("BOFT", "boft_block_size", "boft_block_num")):
        if kind == method_name and bool(value(run, one)) == bool(value(run, other)):
            both = "both given" if value(run, one) else "both 0"
            text = f"{kind}'s {one} and {other} are {both}: one follows from the other"
            yield text, f"peft.{other}", f"peft.{one}=0 peft.{other}=4"
    if kind == "GRALORA" and value(run, "r") % max(1, value(run, "gralora_k")):
        text = f"r={value(run, 'r')} does not divide by gralora_k={value(run, 'gralora_k')}"
        yield text, "peft.gralora_k", "peft.gralora_k=2 with an even r"
    if kind == "ROAD" and value(run, "group_size") % 2:
        yield "ROAD turns pairs: group_size must be even", "peft.group_size", "peft.group_size=64"
    if kind == "IA3" and isinstance(peft.get("target_modules"), list):
        extra = set(peft.get("feedforward_modules") or ()) - set(peft["target_modules"])
        if extra:
            text = f"feedforward_modules names {', '.join(sorted(map(str, extra)))}, which target_modules does not"
            yield text, "peft.feedforward_modules", "name them in both"
    if kind == "SUPERTUNING" and peft.get("lora_alpha") is not None and peft.get("r") is None:
        yield "SUPERTUNING reads lora_alpha only beside r", "peft.lora_alpha", "peft.r=8"
    if kind == "CARTRIDGE" and value(run, "num_frozen_tokens") >= (value(run, "num_virtual_tokens") or 0):
        yield (
            "num_frozen_tokens leaves no virtual token to train",
            "peft.num_frozen_tokens",
            "peft.num_frozen_tokens=1",
        )
    if kind == "VBLORA" and value(run, "topk") > value(run, "num_vectors"):
        yield f"topk={value(run, 'topk')} of num_vectors={value(run, 'num_vectors')}", "peft.topk", "peft.topk=2"
    yield from patterns(peft)
    yield from token_indices(run, peft.get("trainable_token_indices"))
    yield from prompts(run, kind, peft)


def patterns(peft: dict[str, Any]) -> Violations:
    """Yield sizes for single modules that no module can have."""
    for key in ("rank_pattern", "block_size_pattern", "n_frequency_pattern"):
        for name, size in (peft.get(key) or {}).items() if isinstance(peft.get(key), dict) else ():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                yield f"{key} gives {name} the size {size!r}", f"peft.{key}", f"'peft.{key}={{{name}: 8}}'"
    for key in ("alpha_pattern", "lambda_pattern"):
        for name, size in (peft.get(key) or {}).items() if isinstance(peft.get(key), dict) else ():
            if not isinstance(size, int | float) or isinstance(size, bool) or size <= 0:
                yield f"{key} gives {name} {size!r}", f"peft.{key}", f"'peft.{key}={{{name}: 16}}'"


def token_indices(run: RuleContext, given: Any) -> Violations:
    """Yield tokens to train that are none: a list of ids, or one for each embedding by its name."""
    key, rows = "peft.trainable_token_indices", run.base.text.get("vocab_size")
    for name, ids in (given if isinstance(given, dict) else {"": given or []}).items():
        if name and str(name).rpartition(".")[2] not in architectures.EMBEDDING_NAMES:
            yield f"{name} is no embedding: it has no row for a token", key, f"'{key}={{embed_tokens: [5, 6]}}'"
        ids = ids if isinstance(ids, list) else [ids]
        wrong = [i for i in ids if type(i) is not int or i < 0 or (isinstance(rows, int) and i >= rows)]
        if wrong or (given is not None and not ids):
            fix = f"ids from 0 to {rows - 1 if isinstance(rows, int) else 'the size of the vocabulary'}"
            yield f"{wrong or ids} holds no id of a token", key, fix


def prompts(run: RuleContext, kind: str, peft: dict[str, Any]) -> Violations:
    """Yield what the prompt methods cannot do: start from a text without it, have another width than the base."""
    if "num_virtual_tokens" not in fields.field_tables().get(kind, {}):
        return
    key = "peft.prompt_tuning_init"
    by_text = str(peft.get("prompt_tuning_init")) == "TEXT"
    for needed in ("prompt_tuning_init_text", "tokenizer_name_or_path") if by_text else ():
        if not peft.get(needed):
            example = "'Answer the question:'" if needed.endswith("text") else run.plan["model"]["name_or_path"]
            yield f"prompt_tuning_init=TEXT needs {needed}", key, f"peft.{needed}={example}"
    own = run.base.text
    for name, theirs in (
        ("token_dim", run.base.hidden_size),
        ("num_layers", own.get("num_hidden_layers")),
        ("num_attention_heads", own.get("num_attention_heads")),
    ):
        given = peft.get(name)
        if given is not None and theirs and given != theirs:
            yield f"{name}={given}, and the base has {theirs}", f"peft.{name}", f"remove peft.{name}: it is the base's"


def targeted_shapes(run: RuleContext) -> dict[str, tuple[int, int]]:
    """{last name: (out_features, in_features)} of the layers' matrices that the method is put on."""
    targets = (run.plan["peft"] or {}).get("target_modules")
    shapes = architectures.layer_shapes(run.base.text)
    if targets == "all-linear":
        return shapes
    if targets is None:  # PEFT's own choice for most families
        return {name: shapes[name] for name in ("q_proj", "v_proj") if name in shapes}
    named = {m.rpartition(".")[2] for m in run.base.modules or () if targets and names_module(targets, m)}
    return {name: shape for name, shape in shapes.items() if name in named}


def against_a_matrix(run: RuleContext, kind: str, rows: int, columns: int) -> Iterator[tuple[str, str]]:
    """Yield (problem, key) where a method's sizes do not fit a matrix of `rows` outputs and `columns` inputs."""
    key = SIZES.get(kind)
    if key is None:
        return
    size = value(run, key)
    if not isinstance(size, int) or (size < 1 and kind not in ("OFT", "BOFT")):
        return  # refused already
    if kind in ("VBLORA", "C3A", "GRALORA") and (rows % size or columns % size):
        yield f"{key}={size} does not divide both", key
    if kind == "ROAD" and rows % size:
        yield f"{key}={size} does not divide {rows}", key
    if kind in ("MISS", "FOURIERFT", "WAVEFT", "PSOFT", "SHIRA"):
        most = {"MISS": columns, "PSOFT": min(rows, columns), "SHIRA": rows * columns // (rows + columns)}
        if size > (limit := most.get(kind, rows * columns)):
            yield f"{key}={size}, of at most {limit}", key
    if kind == "OFT":
        for name in ("oft_block_size", "r"):
            if (given := value(run, name)) and (columns % given or given > columns):
                yield f"{name}={given} does not divide {columns}: PEFT would take another number", name
    if kind == "BOFT":
        factor = 2 ** (value(run, "boft_n_butterfly_factor") - 1)
        for name in ("boft_block_size", "boft_block_num"):
            if (given := value(run, name)) and columns % (given * (factor if name.endswith("size") else 1)):
                yield f"{name}={given} with boft_n_butterfly_factor does not divide {columns}", name


# The field whose value must fit the matrices.
SIZES = {"VBLORA": "vector_length", "C3A": "block_size", "GRALORA": "gralora_k", "ROAD": "group_size", "MISS": "r",
         "PSOFT": "r", "SHIRA": "r", "FOURIERFT": "n_frequency", "WAVEFT": "n_frequency", "OFT": "oft_block_size",
         "BOFT": "boft_block_size"}  # fmt: skip


def fitting(run: RuleContext, kind: str, key: str, shapes: dict[str, tuple[int, int]]) -> str:
    """Suggest the largest size, halved from the present one, that fits every matrix."""
    settings = dict(run.plan["peft"])
    size = 1 << max(0, int(value(run, key)).bit_length() - 1)
    while size > 1:
        run.plan["peft"] = {**settings, key: size}
        fits = not any(True for r, c in shapes.values() for _ in against_a_matrix(run, kind, r, c))
        run.plan["peft"] = settings
        if fits:
            break
        size //= 2
    return f"peft.{key}={size}"
