"""The rules of the adapter against its base: which modules it names, which embeddings it ties or trains.

Weights are never read. kit/config/rules/table.py lists them.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from kit.config.added_tokens import is_tied
from kit.config.rules.context import RuleContext, Violations
from kit.config.rules.model import as_int, family
from kit.inspection import architectures
from kit.inspection.trainable import is_in_layers
from kit.schema.checkpointing import is_checkpointed


def lm_head_target(run: RuleContext) -> Violations:
    """target_modules is a list of ends of names, or one expression for a whole name; exclude_modules too."""
    peft = run.plan["peft"] or {}
    targets = peft.get("target_modules")
    if not targets or targets == "all-linear":  # PEFT leaves the head out of it
        return
    heads = [m for m in run.base.modules or [] if m.rpartition(".")[2] in architectures.OUTPUT_EMBEDDINGS]
    for head in heads or ["lm_head"]:
        if names_module(targets, head) and not names_module(peft.get("exclude_modules"), head):
            whole = "" if isinstance(targets, list) else ", or end the expression with layers' names"
            yield (
                f"{head} cannot be a LoRA target: the trainer's fused loss reads its weight directly",
                "peft.target_modules",
                f"drop it{whole}, or train it whole: peft.modules_to_save=[{head}]",
            )


def names_module(names: Any, module: str) -> bool:
    """Whether PEFT takes a module to be named, by the end of its name or by an expression for all of it."""
    if isinstance(names, str):
        try:
            return bool(re.fullmatch(names, module))
        except re.error:
            return False
    return any(ends_in(module, str(n)) for n in names or ())


def expressions(run: RuleContext) -> Violations:
    peft = run.plan["peft"] or {}
    for key in ("target_modules", "exclude_modules"):
        if isinstance(peft.get(key), str) and (error := is_broken(peft[key])):
            yield (
                f"{key} is no regular expression: {error}",
                f"peft.{key}",
                f"list names: 'peft.{key}=[q_proj,v_proj]'",
            )


def is_broken(expression: str) -> re.error | None:
    """What is wrong with a regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        return error
    return None


def targets_match_nothing(run: RuleContext) -> Violations:
    targets = (run.plan["peft"] or {}).get("target_modules")
    if not targets or targets == "all-linear" or run.base.modules is None:
        return
    named, known = run.base.modules, architectures.all_module_names(run.base.text) or run.base.modules
    reached = known if method(run) == "LN_TUNING" else [*named, *lora_names(run)]
    if isinstance(targets, str):
        dead = [] if is_broken(targets) or any(names_module(targets, m) for m in known) else [targets]
    else:
        dead = [t for t in targets if not any(ends_in(m, t) for m in reached)]
    other = [t for t in dead if any(ends_in(m, t) for m in known)]
    fix = f"all-linear, or some of {', '.join(layer_matrices(named))}"
    if other:
        problem = f"{', '.join(other)} is no matrix that {method(run)} can adapt: PEFT refuses it"
        yield problem, "peft.target_modules", f"{fix}; trained whole: peft.modules_to_save=[{','.join(other)}]"
    unknown = [t for t in dead if t not in other and not (missed_experts(run) and t in USUAL)]
    if unknown:
        yield f"no module of the base is named {', '.join(map(str, unknown))}", "peft.target_modules", fix


USUAL = ("gate_proj", "up_proj", "down_proj")  # of the seven names that most recipes list


def missed_experts(run: RuleContext) -> list[str]:
    """List usual targets that name nothing in a base whose experts are fused, beside others that name something."""
    targets = (run.plan["peft"] or {}).get("target_modules")
    if not isinstance(targets, list) or run.base.modules is None or family(run) not in architectures.FUSED_EXPERTS:
        return []
    reached = [*run.base.modules, *lora_names(run)]
    dead = [t for t in targets if t in USUAL and not any(ends_in(m, t) for m in reached)]
    return dead if any(ends_in(m, str(t)) for t in targets for m in reached) else []


def experts_missed(run: RuleContext) -> Violations:
    """PEFT passes over the names of a list that match nothing, as long as one matches."""
    if dead := missed_experts(run):
        problem = f"{', '.join(dead)} names nothing here: the experts are one fused parameter, and only "
        problem += "the other targets are trained"
        names = ",".join(architectures.FUSED_EXPERTS[family(run)])
        fix = f"leave {','.join(dead)} out"
        yield problem, "peft.target_modules", f"{fix}, or name the experts: {names}" if method(run) == "LORA" else fix


def method(run: RuleContext) -> str:
    return str((run.plan["peft"] or {}).get("peft_type", "")).upper()


def lora_names(run: RuleContext) -> list[str]:
    """List what LoRA alone can target beside linear layers: the router of a mixture of experts, and the experts."""
    names = architectures.FUSED_EXPERTS.get(family(run), ()) if method(run) == "LORA" else ()
    return [architectures.ROUTER, *names] if names else []


def ends_in(module: str, name: str) -> bool:
    """Tell whether a module has that name, as PEFT compares a list of names."""
    return module == name or module.endswith(f".{name}")


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
    known = architectures.all_module_names(run.base.text) or []
    parts = {part for m in [*known, *run.base.modules] for part in m.split(".")}
    for name in saved:
        last = str(name).rpartition(".")[2]
        if last not in parts and (known or not re.search(r"norm|ln_|rotary|positions|wpe|act", last)):
            close = difflib.get_close_matches(last, sorted(parts), 2)
            fix = f"did you mean {' or '.join(close)}?" if close else "peft.modules_to_save=[embed_tokens,lm_head]"
            problem = f"no module of the base is named {name}: PEFT would train and save nothing for it, in silence"
            yield problem, "peft.modules_to_save", fix


def parameters_match_nothing(run: RuleContext) -> Violations:
    """PEFT passes over a name in target_parameters that no parameter ends with."""
    named = (run.plan["peft"] or {}).get("target_parameters")
    if not isinstance(named, list) or run.base.modules is None or family(run) not in architectures.LINEARS:
        return
    known = [f"{m}.weight" for m in architectures.all_module_names(run.base.text) or run.base.modules]
    if family(run) in architectures.FUSED_EXPERTS:
        layers = {m.split(".self_attn.")[0] for m in run.base.modules if ".self_attn." in m}
        known += [f"{layer}.mlp.{name}" for layer in sorted(layers) for name in architectures.EXPERT_PARAMETERS]
    for name in named:
        if not any(ends_in(p, name) for p in known):
            ends = sorted({".".join(p.split(".")[-2:]) for p in known})
            close = difflib.get_close_matches(str(name), ends, 2) or ends[:4]
            fix = f"some of {', '.join(close)}"
            yield f"no parameter of the base is named {name}: PEFT would pass over it", "peft.target_parameters", fix


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


def layers_drop_target(run: RuleContext) -> Violations:
    """A target that stands outside of the numbered layers is dropped where layers are chosen."""
    peft = run.plan["peft"] or {}
    targets, layers = peft.get("target_modules"), peft.get("layers_to_transform")
    if not isinstance(targets, list) or layers in (None, []) or run.base.modules is None:
        return
    for target in targets:
        named = [m for m in run.base.modules if ends_in(m, target)]
        if named and not any(m == target or is_in_layers(m, layers, peft.get("layers_pattern")) for m in named):
            yield (
                f"{target} is in none of the layers of layers_to_transform: PEFT drops it without a word",
                "peft.target_modules",
                f"drop it, or train it whole: peft.modules_to_save=[{target}]",
            )


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
    if kind in ("PREFIX_TUNING", "CARTRIDGE") and is_checkpointed(run.plan["trainer"]):
        problem = f"{kind} keeps a cache, which recomputed activations do not have"
        yield problem, "trainer.gradient_checkpointing", "trainer.gradient_checkpointing=false"
