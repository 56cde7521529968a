"""The rules of the adapter against its base: which modules it names, which embeddings it ties or trains.

Weights are never read. kit/config/rules/table.py lists them.
"""

from __future__ import annotations

import difflib
import re
from importlib.util import find_spec

from kit.config.added_tokens import is_tied
from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.launch import checkpointing
from kit.config.rules.model import as_int, family
from kit.inspection import architectures


def lm_head_target(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    named = [targets] if isinstance(targets, str) else targets or []
    if any(t == "lm_head" or str(t).endswith(".lm_head") for t in named):
        yield (
            "lm_head cannot be a LoRA target: the trainer's fused loss reads its weight directly",
            "peft.target_modules",
            "drop it, or train it whole: peft.modules_to_save=[lm_head]",
        )


def targets_match_nothing(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    if not targets or targets == "all-linear" or run.base.modules is None:
        return
    if isinstance(targets, str):
        try:
            matched = [m for m in run.base.modules if re.fullmatch(targets, m)]
        except re.error as error:
            yield (
                f"target_modules is no regular expression: {error}",
                "peft.target_modules",
                "list names, or all-linear",
            )
            return
        dead = [] if matched else [targets]
    else:
        dead = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in run.base.modules)]
    if dead:
        fused = family(run) in architectures.FUSED_EXPERTS
        reason = ": its experts are fused 3-D parameters, LoRA reaches the attention only" if fused else ""
        yield (
            f"no module of the base is named {', '.join(map(str, dead))}{reason}",
            "peft.target_modules",
            f"all-linear, or some of {', '.join(layer_matrices(run.base.modules))}",
        )


def layer_matrices(modules: list[str]) -> list[str]:
    """The last names of the layers' own matrices."""
    return sorted({m.rsplit(".", 1)[-1] for m in modules if not m.endswith(("lm_head", "norm"))})


def patterns_match_nothing(run: RuleContext) -> Violations:
    """PEFT reads a key of rank_pattern and alpha_pattern as the end of a module's name, or as an expression for it."""
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = (run.plan["peft"] or {}).get(name)
        if run.base.modules is None or not isinstance(pattern, dict):
            continue
        for key in pattern:
            try:
                hit = any(re.match(rf"(.*\.)?({key})$", m) for m in run.base.modules)
            except re.error:
                hit = False
            if not hit:
                problem = f"{name} names {key}, and no module of the base has that name: PEFT passes over it"
                yield problem, f"peft.{name}", f"one of {', '.join(layer_matrices(run.base.modules))}"


def saved_match_nothing(run: RuleContext) -> Violations:
    saved = (run.plan["peft"] or {}).get("modules_to_save")
    if not isinstance(saved, list) or run.base.modules is None or family(run) not in architectures.LINEARS:
        return
    parts = {part for m in run.base.modules for part in m.split(".")}
    for name in saved:
        last = str(name).rpartition(".")[2]
        if last not in parts and not re.search(r"norm|ln_|rotary|positions|wpe|act", last):
            close = difflib.get_close_matches(last, sorted(parts), 2)
            fix = f"did you mean {' or '.join(close)}?" if close else "peft.modules_to_save=[embed_tokens,lm_head]"
            problem = f"no module of the base is named {name}: PEFT would train and save nothing for it, in silence"
            yield problem, "peft.modules_to_save", fix


def loftq_packages(run: RuleContext) -> Violations:
    if (run.plan["peft"] or {}).get("init_lora_weights") == "loftq" and find_spec("scipy") is None:
        yield (
            "init_lora_weights=loftq needs scipy, which is not installed",
            "peft.init_lora_weights",
            "pip install scipy",
        )


def layers_range(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    given, pattern = peft.get("layers_to_transform"), peft.get("layers_pattern")
    key, asked = "peft.layers_to_transform", given if isinstance(given, list) else [given]
    if isinstance(peft.get("target_modules"), str):
        for name, value in (("layers_to_transform", given), ("layers_pattern", pattern)):
            if value is not None:
                fix = "peft.target_modules=[q_proj,v_proj]"
                yield f"{name} needs target_modules as a list of names", f"peft.{name}", fix
    elif pattern and not given:
        yield "layers_pattern without layers_to_transform", "peft.layers_pattern", "peft.layers_to_transform=[0,1]"
    layers = as_int(run.base.text.get("num_hidden_layers", run.base.text.get("n_layer")))
    beyond = [n for n in asked if isinstance(n, int) and layers and not 0 <= n < layers]
    if beyond:
        problem = f"the base has layers 0 to {layers - 1}: {', '.join(map(str, beyond))} does not exist"  # type: ignore[operator]
        yield problem, key, f"numbers below {layers}"


def tied_target(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    ends = (
        [t for t in targets if str(t).rpartition(".")[2] in architectures.INPUT_EMBEDDINGS]
        if isinstance(targets, list)
        else []
    )
    if ends and is_tied(run.base):
        yield (
            f"{ends[0]} is tied to the output: LoRA trains the input side, and merging changes both",
            "peft.target_modules",
            f"peft.modules_to_save=[{ends[0]}] peft.ensure_weight_tying=true trains the matrix whole",
        )


def tied_saved(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    saved = peft.get("modules_to_save")
    ends = (
        [s for s in saved if str(s).rpartition(".")[2] in architectures.EMBEDDING_NAMES]
        if isinstance(saved, list)
        else []
    )
    if ends and is_tied(run.base) and not peft.get("ensure_weight_tying"):
        yield (
            f"{', '.join(ends)} is one end of a tied matrix: the ends part, and the merged model grows by one of them",
            "peft.modules_to_save",
            "peft.ensure_weight_tying=true keeps them one",
        )


def prefix_checkpointing(run: RuleContext) -> Violations:
    kind = str((run.plan["peft"] or {}).get("peft_type", "")).upper()
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and checkpointing(run):
        problem = f"{kind} keeps a cache, which recomputed activations do not have"
        yield problem, "trainer.gradient_checkpointing", "trainer.gradient_checkpointing=false"
