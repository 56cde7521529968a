"""The verbs as functions: what the command line calls, and what `from kit import train` gives."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kit.errors import ENVIRONMENT, KitError, Problem
from kit.schema.run_plan import Dataset, DataSource, RunPlan, field_class, leaves, load_plan
from kit.storage import run_directory
from kit.system.dependencies import require_training_extras


def compose(*args: str, config_dir: str | None = None, here: bool = False, world_size: int | None = None) -> RunPlan:
    """The frozen plan of `[run.yaml] key=value ...`; KitError with all problems. `here`: for this machine."""
    from kit.config.compose import compose as compose_tree
    from kit.config.plan import build_plan

    return build_plan(compose_tree(list(args), config_dir), here=here, world_size=world_size)


def check(*args: str, config_dir: str | None = None) -> list[Problem]:
    """Everything that is wrong with a run, as a list; empty where it is valid. Imports no torch."""
    try:
        compose(*args, config_dir=config_dir)
    except KitError as error:
        return error.problems
    return []


def data(
    *args: str,
    config_dir: str | None = None,
    samples: int = 3,
    row: int | None = None,
    file: str | None = None,
    fix_out: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """What `kit data --json` prints of `[DATA ...] key=value ...`; without a model, rows as they stand in their files.

    `row`, of `file` where there are several: that row alone. `fix_out`: where the rows that are kept are written.
    `refused` says whether the plan lets the bad rows pass. KitError where the data cannot be read at all.
    """
    from kit.data import load, preview

    plan, dataset = data_plan(*args, config_dir=config_dir)
    tokenizer = None
    shown: dict[str, Any] = {"model": None}
    notes: list[str] = []
    if plan:
        shown = {"model": plan.model.name_or_path, "train_on": plan.train_on}
        tokenizer, missing = open_tokenizer(plan)
        notes += [missing] if missing else []
    if dataset.streaming:
        dataset = load.first_of_stream(dataset)
        plan = plan and plan.model_copy(update={"dataset": dataset})
        notes.append(f"of a stream at most {dataset.limit:,} rows are looked at")
    if row is not None:
        found, refused = preview.preview_row(dataset, plan if tokenizer else None, tokenizer, row, file)
        return shown | {"row": found, "notes": notes, "problems": [], "refused": refused}
    if fix_out:
        preview.check_clean_file(Path(fix_out), dataset, overwrite)
    with tempfile.TemporaryDirectory(prefix="kit-data-") as temporary:
        folder = Path(temporary)
        if plan and tokenizer:
            found, folder = preview.preview_tokens(plan, tokenizer, samples)
        else:
            found = preview.preview_raw(dataset, folder)
        if fix_out:
            found["fix_out"] = preview.write_clean(dataset, folder, Path(fix_out))
    problems = [asdict(p) for p in found["problems"]]
    return shown | found | {"notes": notes + found["notes"], "problems": problems, "refused": bool(problems)}


def data_plan(*args: str, config_dir: str | None = None) -> tuple[RunPlan | None, Dataset]:
    """The plan of a run, whatever its rows are, or None where no model is named; and its data."""
    from kit.config.compose import compose as compose_tree
    from kit.config.plan import build_plan, read_dataset

    composed = compose_tree(list(args), config_dir)
    if (composed.tree.get("model") or {}).get("name_or_path") in (None, "???"):
        return None, read_dataset(composed)
    plan = build_plan(composed, here=False, bad_rows=False)
    return plan, plan.dataset


def open_tokenizer(plan: RunPlan) -> tuple[Any, str]:
    """(the plan's tokenizer, "") where it is here; (None, why not) where it or the training stack is not."""
    from kit.system.terminal import silence_libraries

    try:
        silence_libraries()
        from kit.models.load import load_tokenizer

        return load_tokenizer(plan), ""
    except KitError as error:
        problem = error.problems[0]
        name = plan.tokenizer.name_or_path or plan.model.name_or_path
        if error.code == ENVIRONMENT:
            return None, f"rows are not rendered: {problem.problem}; {problem.fix}"
        if problem.where != "tokenizer.name_or_path":
            raise
        fix = "" if Path(name).is_absolute() else f"; kit fetch model.name_or_path={name} brings it"
        return None, f"rows are not rendered: the tokenizer of {name} is not here{fix}"


def train(
    *args: str,
    config_dir: str | None = None,
    fresh: bool = False,
    plan: RunPlan | None = None,
    follow: bool = False,
    then: Sequence[str] = (),
) -> int:
    """Compose, make the run directory, launch, and stay until it is done; the exit code. KitError when it failed.

    With launch=slurm it is submitted; `follow` stays with the job, `then` are the verbs that come after it.
    """
    from kit.launchers.node import resolve_node
    from kit.launchers.supervise import launch

    plan = plan or compose(*args, config_dir=config_dir, here=True)
    if plan.launch.slurm:
        from kit.launchers import slurm

        return slurm.create_and_submit(plan, fresh, follow, then)
    if follow or then:
        raise KitError("--follow and --then are for batch jobs", "command line", "launch=slurm")
    require_training_extras()
    # Before there is a directory: a node without a number, or one that is not the first, is refused here.
    if rank := plan.launch.node_rank or resolve_node(plan).launch.node_rank:
        raise KitError(
            f"node {rank} cannot compose the run: node 0 does, and makes its directory",
            "launch.node_rank",
            "kit train ... launch.node_rank=0 there, and here the kit launch-node command that it prints",
        )
    node_rank = {"node_rank": plan.launch.node_rank}  # which is this command's, not the plan's
    plan = plan.model_copy(update={"launch": plan.launch.model_copy(update={"node_rank": None})})
    plan = run_directory.create_run_directory(plan, fresh)
    return launch(plan.model_copy(update={"launch": plan.launch.model_copy(update=node_rank)}))


def resume(run: str, *overrides: str) -> int:
    """Continue from the newest complete checkpoint; `overrides` may change extendable and machine keys only."""
    from kit.launchers.environment import numeric_environment
    from kit.launchers.supervise import launch
    from kit.storage import checkpoints, manifest
    from kit.system.terminal import print_status
    from kit.training import fingerprints

    path = run_directory.find_run(run)
    plan = load_plan(path).model_copy(update={"run_dir": str(path)})
    state = run_directory.read_status(path)
    if plan.launch.slurm:
        from kit.launchers import slurm

        slurm.refuse_second_job(path)
    else:
        require_training_extras()
    if pid := run_directory.process_holding_lock(path):
        raise KitError(f"{path} is in use by process {pid}", fix="wait for it")
    if state.get("state") == "done" and not overrides:
        raise KitError(f"{path} is finished at step {state.get('step')}", fix="kit resume RUN trainer.max_steps=MORE")
    newest = manifest.newest_complete_checkpoint(path / run_directory.CHECKPOINTS)
    for reason in newest.skipped:
        print_status(f"passed over {reason}")
    if newest.path is None:
        raise KitError(
            f"{path} has no complete checkpoint", str(path / run_directory.CHECKPOINTS), "kit train ... --fresh"
        )
    fingerprints.compare_plan(path)
    fingerprints.compare_checkpoint(plan, newest.path)
    fingerprints.compare_inputs(plan, newest.path, lambda: open_tokenizer(plan)[0], numeric_environment())
    start_anew = checkpoints.start_from_weights(
        newest.path, plan.overrides, list(overrides), plan.global_batch_size, bool(plan.peft)
    )
    begun, plan = plan, override_plan(plan, list(overrides), start_anew)
    refused = checkpoints.refuse_resume(
        newest.path,
        manifest.read_manifest(newest.path)["world_size"],
        plan.world_size,
        trainer=plan.trainer,
        streaming=plan.dataset.streaming,
        deepspeed=plan.deepspeed,
        adapter=bool(plan.peft),
        start_anew=start_anew,
        before=begun.deepspeed,
    )
    if refused:
        raise KitError(refused)
    run_directory.write_plan(plan)
    print_status(f"resuming from {newest.path.name}")
    if plan.launch.slurm:  # the job looks for the newest checkpoint itself
        from kit.launchers import slurm

        return slurm.submit_run(plan)
    return launch(plan, resume=newest.path.name)


def override_plan(plan: RunPlan, overrides: list[str], start_anew: str = "") -> RunPlan:
    """The plan with extendable and machine keys changed, from the tree that it froze; edited YAML plays no part.

    Where processes or their rows change and no accumulation is given, it is derived: the global batch stays.
    start_anew: the command for a new run from the checkpoint's weights, for refusals.
    """
    if not overrides:
        return plan
    from kit.config import memory_choice
    from kit.config.compose import Composed, apply_overrides
    from kit.config.plan import build_plan

    # A launcher by its group's name, as a run's command line and its refusals have it.
    overrides = [re.sub(r"^launch=(auto|deepspeed|local|torchrun)$", r"launch.launcher=\1", o) for o in overrides]
    begun = plan.composed
    if (packing := (begun.get("trainer") or {}).get("packing")) == "auto":  # decided: the data may be gone or longer
        begun = {**begun, "trainer": {**begun["trainer"], "packing": plan.trainer["packing"]}}
    tree = apply_overrides(begun, overrides)
    before, after = leaves(begun), leaves(tree)
    touched = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    provenance = {**plan.provenance, **{k: f"command line (resume): {k}" for k in touched}}
    typed = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "trainer.gradient_accumulation_steps" not in typed and any(map(_divides_the_batch, touched)):
        # A step's rows are the run's; how they are divided is this resume's, whatever was typed for the first start.
        provenance.pop("trainer.gradient_accumulation_steps", None)
        if "global_batch_size" not in typed:
            tree["global_batch_size"], provenance["global_batch_size"] = plan.global_batch_size, "plan.json"
    # The adapter that the run once started from may be gone: the checkpoint stands in its place.
    peft = {k: v for k, v in (tree.get("peft") or {}).items() if not k.startswith("init_from")}
    composed = Composed({**tree, "peft": peft}, [*plan.overrides, *overrides], provenance, plan.recipe)
    try:
        new = build_plan(composed, here=True)
    except KitError as error:
        problems = [_with_ways_on(p, plan, start_anew) if p.rule == "batch" else p for p in error.problems]
        raise KitError(problems, code=error.code) from None
    refused = [k for k in touched if field_class(k) == "identity" and k != "global_batch_size"]
    if refused:
        raise KitError(
            [
                Problem(
                    f"{k} cannot change within a run ({before.get(k)!r} -> {after.get(k)!r}): it would be another run",
                    f"command line: {k}",
                    "kit train with it",
                )
                for k in refused
            ]
        )
    if new.global_batch_size != plan.global_batch_size:
        raise KitError(
            f"the global batch would change from {plan.global_batch_size} to {new.global_batch_size} rows: "
            "another run",
            where="global_batch_size, trainer.gradient_accumulation_steps",
            fix="leave both out: the accumulation is derived",
        )
    # The name and the base's identity stay: the directory is this run's for good.
    unchanged = {key: getattr(plan, key) for key in ("run_dir", "hash", "name", "base", "init_from", "tokenizer")}
    if plan.memory and not typed.intersection(memory_choice.KEYS) and new.world_size == plan.world_size:
        # What the first start found to fit, its trial included: nothing is chosen anew.
        new = memory_choice.with_option(new, plan.memory)
    if "model.attn_implementation" not in typed:  # another rule since then, or another machine, changes no numbers
        of_model = {"attn_implementation": plan.model.attn_implementation}
        unchanged["model"] = new.model.model_copy(update=of_model)
    kept = {"peft": tree.get("peft")}
    if packing == "auto":
        kept["trainer"] = {**new.composed["trainer"], "packing": packing}
    return new.model_copy(update={**unchanged, "composed": {**new.composed, **kept}})


def _with_ways_on(problem: Problem, plan: RunPlan, start_anew: str) -> Problem:
    """A batch that does not divide, with what a resume can do: its global batch is the run's."""
    if problem.fix.startswith("trainer."):
        fix, start_anew = problem.fix, f"{start_anew} {problem.fix}" if start_anew else ""
    else:
        fix = f"a number of processes that divides {plan.global_batch_size} rows"
        start_anew = start_anew.replace(f"global_batch_size={plan.global_batch_size}", problem.fix)
    return replace(problem, fix=f"{fix}; or a new run from its weights: {start_anew}" if start_anew else fix)


def _divides_the_batch(key: str) -> bool:
    """Whether a key is about how many processes share a step's rows, or how many rows each takes at once."""
    return key.startswith("launch.") or key in ("trainer.per_device_train_batch_size", "global_batch_size")


def plan_summary(plan: RunPlan) -> dict[str, Any]:
    """The figures of a plan that `kit check` prints."""
    from kit.config.memory_check import describe_forecast

    memory = describe_forecast(plan)
    return {
        "run": run_directory.path_from_here(plan.run_dir),
        "model": plan.model.name_or_path,
        "method": (plan.peft or {}).get("peft_type", "full fine-tuning"),
        "engine": f"{plan.launch.launcher}, ZeRO-{plan.zero_stage}" if plan.deepspeed else plan.launch.launcher,
        "processes": plan.world_size,
        "precision": plan.precision,
        "batch": f"{plan.global_batch_size} rows = {plan.trainer['per_device_train_batch_size']} x "
        f"{plan.trainer['gradient_accumulation_steps']} x {plan.world_size}",
        **({"memory": memory} if memory else {}),
        "data": describe_data(plan),
        "notes": plan.notes,
        "warnings": warning_lines(plan),
    }


def describe_data(plan: RunPlan) -> str:
    """The data sets by name, their format, and which of their tokens are in the loss."""
    d = plan.dataset
    sources: list[DataSource] = list(d.mix) or [d]
    paths = [([s.path] if isinstance(s.path, str) else s.path or [], s.format) for s in sources]
    named = [(Path(p[0]).name + (f" and {len(p) - 1} more" if p[1:] else ""), form) for p, form in paths if p]
    said = ", ".join(name + ("" if form == "auto" else f" ({form})") for name, form in named)
    return said + (f"; loss on {plan.train_on.replace('_', ' ')}" if plan.train_on else "")


def warning_lines(plan: RunPlan) -> list[str]:
    """What the rules say about a plan that they do not refuse, a line to each, with the rule's id."""
    return [f"{w['problem']} ({w['where']}); {w['fix']} [{w['rule']}]" for w in plan.warnings]
