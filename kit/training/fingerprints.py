"""What a run is trained on, written down in its directory, and compared before a resume goes on with it.

fingerprints.json holds the plan as it was frozen, the files of data, tokenizer and base with their sizes and SHA-256,
a hash of the tokens, the schedule, the variables that change numbers and the versions of the libraries. It stands
neither in the plan nor in the run's name, and `kit check` computes none of it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kit.errors import REFUSED, KitError, Problem
from kit.inspection.tokenizer import find_chat_template
from kit.launchers import environment
from kit.schema.run_plan import RunPlan, field_class, leaves
from kit.storage import run_directory, safetensors_header
from kit.storage.checkpoints import weights_override
from kit.storage.digests import describe_files
from kit.storage.json_files import read_json_or_empty
from kit.storage.manifest import what_it_resumes
from kit.system.dependencies import installed_version
from kit.system.terminal import print_status

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "tokenizers",
)
TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja"),
)
SHOWN = 5  # differences of one kind that a message lists

Files = dict[str, dict[str, Any]]


# ---- what there is now ----


def data_files(plan: RunPlan) -> Files:
    """The files that the rows come from, in the order in which they are read; KitError where one is missing."""
    from kit.data.load import open_all

    return describe_files([file for opened in open_all(plan.dataset) for file in opened.files])


def tokenizer_files(plan: RunPlan) -> Files:
    """The files that make the tokenizer and its chat template; empty where they are not on this machine yet."""
    t = plan.tokenizer
    revision = t.revision or (plan.model.revision if t.name_or_path is None else None)
    folder = safetensors_header.find_model_folder(t.name_or_path or plan.model.name_or_path, revision)
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)} if folder else set()
    if t.chat_template:
        found.add(find_chat_template(t.chat_template))
    return describe_files(sorted(file for file in found if file.is_file()))


def base_files(plan: RunPlan) -> Files:
    """config.json and the weights of the base; empty where they are not on this machine yet."""
    folder = safetensors_header.find_model_folder(plan.model.name_or_path, plan.model.revision)
    if folder is None:
        return {}
    weights = [] if plan.model.random_init else safetensors_header.shard_files(folder)
    return describe_files([file for file in (folder / safetensors_header.CONFIG, *weights) if file.is_file()])


def library_versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    return {name: version for name in PACKAGES if (version := installed_version(name))}


def started_with(plan: RunPlan) -> dict[str, str]:
    """The variables that change numbers, as rank 0 was started with them: libraries set some of them later."""
    record = read_json_or_empty(plan.run_path / environment.FILE)
    return dict(record.get("numeric_environment") or {})


def token_fingerprint(tokenizer: Any) -> dict[str, str]:
    """Hashes of what a loaded tokenizer does and of its chat template."""
    from kit.data.prepare import tokenizer_digest

    template = tokenizer.chat_template or ""
    text = template if isinstance(template, str) else repr(sorted(template.items()))
    return {"sha256": tokenizer_digest(tokenizer), "template_sha256": hashlib.sha256(text.encode()).hexdigest()}


def row_fingerprint(report: dict[str, Any]) -> dict[str, str]:
    """The hash of each split's tokens; a stream has none before its end."""
    return {name: part["sha256"] for name, part in report["splits"].items() if "sha256" in part}


# ---- written down ----


def record_inputs(plan: RunPlan, tokenizer: Any, data: Any) -> None:
    """Write down what the run is about to be trained on; rank 0, before training. The base follows behind it."""
    run_directory.update_fingerprints(
        plan.run_path,
        data={"files": data_files(plan), "rows": row_fingerprint(data.report)},
        tokenizer={"files": tokenizer_files(plan), **token_fingerprint(tokenizer)},
        versions=library_versions(),
        environment=started_with(plan),
    )


class BaseDigest:
    """Hashes the files of the base while training goes on; `record` waits for it and writes it down."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan, self.problem = plan, ""
        self.files: Files = {}
        self.thread = threading.Thread(target=self._digest, name="base digest", daemon=True)
        self.thread.start()

    def _digest(self) -> None:
        try:
            self.files = base_files(self.plan)
        except (KitError, OSError) as error:
            self.problem = str(error)

    def record(self) -> None:
        """Write the hashes into the run directory; a line where the base could not be read a second time."""
        self.thread.join()
        if self.problem:
            print_status(f"no fingerprint of the base is kept: {self.problem}")
        run_directory.update_fingerprints(self.plan.run_path, base={"files": self.files})


# ---- compared ----


def compare_inputs(
    plan: RunPlan,
    checkpoint: Path,
    tokenizer: Callable[[], Any],
    variables: Mapping[str, str],
    report: dict[str, Any] | None = None,
) -> list[str]:
    """Compare what there is now with what a run was trained on so far; notes. KitError with every difference.

    tokenizer: gives the plan's tokenizer, or None where it cannot be loaded; called where its files differ, and in the
    ranks. variables: those that change numbers. report: of the prepared rows; in the ranks alone.
    """
    recorded = read_json_or_empty(plan.run_path / run_directory.FINGERPRINTS)
    if "data" not in recorded:
        return [
            f"{plan.run_path.name} was begun by an earlier version, which kept no fingerprints: "
            "whether data, tokenizer and base are still the same is not known"
        ]
    new_run = f"put it back as it was, or begin a new run from what was learned: {new_run_from(plan, checkpoint)}"
    problems: list[Problem] = []

    def differ(what: str, how: str, key: str, fix: str = new_run) -> None:
        problems.append(Problem(f"{what} changed since {checkpoint.name} was saved: {how}", key, fix))

    data_key = "dataset.path" if plan.dataset.path else "dataset.mix"
    for difference in changed_files(recorded["data"]["files"], files_or_missing(lambda: data_files(plan))):
        differ("the data have", difference, data_key)
    before = recorded["tokenizer"]
    changed = changed_files(before["files"], files_or_missing(lambda: tokenizer_files(plan)))
    if (changed or report) and (loaded := tokenizer()) is not None:
        loaded_now = token_fingerprint(loaded)
        files = "; ".join(changed)
        if loaded_now["template_sha256"] != before["template_sha256"]:
            hashes = f"{short(before['template_sha256'])} -> {short(loaded_now['template_sha256'])}"
            differ("the chat template has", files or hashes, "tokenizer.chat_template")
        elif changed and loaded_now["sha256"] != before["sha256"]:
            differ("the tokenizer has", files, "tokenizer.name_or_path")
    if (base := recorded.get("base")) and (base_now := files_or_missing(lambda: base_files(plan))):
        for difference in changed_files(base["files"], base_now):
            belongs = "put it back as it was: what is trained belongs to these weights"
            differ("the base has", difference, "model.name_or_path", belongs)
    before_variables = recorded.get("environment", {})
    for name in sorted(before_variables.keys() | variables.keys()):
        if (was := before_variables.get(name)) != (now := variables.get(name)):
            fix = f"export {name}={was}" if was is not None else f"unset {name}"
            differ(
                f"{name}, which changes numbers, has", f"{was or 'not set'} -> {now or 'not set'}", "environment", fix
            )
    versions = version_changes(recorded["versions"])
    if report and not problems:
        for name, digest in row_fingerprint(report).items():
            if digest != recorded["data"]["rows"].get(name, digest):
                cause = f" ({', '.join(versions)})" if versions else ""
                differ("the tokens have", f"the same files give others in {name}{cause}", data_key)
    if problems:
        raise KitError(problems, code=REFUSED)
    return [f"other versions than this run was begun with: {', '.join(versions)}"] if versions else []


def compare_plan(run: Path) -> None:
    """KitError where plan.json is not the one that was frozen: the keys that were edited, from what to what."""
    recorded = read_json_or_empty(run / run_directory.FINGERPRINTS).get("plan")
    if recorded is None:
        return
    before, now = leaves(recorded), leaves(read_json_or_empty(run / run_directory.PLAN))
    edited = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    edited = [key for key in edited if key.removeprefix("composed.") == key or key[len("composed.") :] not in edited]
    problems = []
    for key in edited[:SHOWN]:
        way = f"kit resume RUN {key}=VALUE" if field_class(key) != "identity" else "kit train with the other value"
        text = f"plan.json was edited after the run began: {key} {before.get(key)!r} -> {now.get(key)!r}"
        problems.append(Problem(text, str(run / run_directory.PLAN), f"put it back as it was; to change it: {way}"))
    if edited[SHOWN:]:
        problems.append(Problem(f"plan.json was edited in {len(edited) - SHOWN} more places", fix="put them back"))
    if problems:
        raise KitError(problems)


def compare_checkpoint(plan: RunPlan, checkpoint: Path) -> None:
    """KitError where a checkpoint holds weights alone: training would begin its schedule again with them."""
    if what_it_resumes(checkpoint) == "training":
        return
    raise KitError(
        f"{checkpoint.name} holds weights alone, no optimizer and no schedule (trainer.save_only_model): "
        "training would begin its warm-up again in the middle of the run",
        str(checkpoint),
        f"a new run from its weights: {new_run_from(plan, checkpoint)}",
    )


def recorded_schedule(plan: RunPlan) -> dict[str, Any]:
    """The schedule that a run had so far; empty where none was written down."""
    return dict(read_json_or_empty(plan.run_path / run_directory.FINGERPRINTS).get("schedule") or {})


def compare_schedule(plan: RunPlan, checkpoint: Path, now: dict[str, Any]) -> bool:
    """Whether the run goes on with another number of steps because it was asked to. KitError where nobody asked."""
    before = recorded_schedule(plan)
    if not before or before == now:
        return False
    if before["asked"] != now["asked"] and before | {"asked": 0, "steps": 0} == now | {"asked": 0, "steps": 0}:
        return bool(before["steps"] != now["steps"])
    changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    raise KitError(
        f"the schedule has changed since {checkpoint.name} was saved: {', '.join(changes)}",
        str(checkpoint),
        f"put it back as it was, or begin a new run from what was learned: {new_run_from(plan, checkpoint)}",
    )


def new_run_from(plan: RunPlan, checkpoint: Path) -> str:
    """The command of a run that begins with the weights of a checkpoint."""
    return f"kit train ... {weights_override(run_directory.path_from_here(checkpoint), bool(plan.peft))}"


def files_or_missing(read: Callable[[], Files]) -> Files:
    """The files that `read` finds; none of them where one cannot be read, so that each is said to be missing."""
    try:
        return read()
    except (KitError, OSError):
        return {}


def changed_files(before: Files, now: Files) -> list[str]:
    """What differs between two listings of files; the same contents under other names are no difference."""
    if [f["sha256"] for f in before.values()] == [f["sha256"] for f in now.values()]:
        return []
    lines = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old is None and new is not None:
            lines.append(f"{name} was not there ({describe(new)})")
        elif old is not None and new is None:
            lines.append(f"{name} ({describe(old)}) " + ("is missing" if not Path(name).exists() else "is not read"))
        elif old and new and old["sha256"] != new["sha256"]:
            lines.append(f"{name}: {describe(old)} -> {describe(new)}")
    more = [f"and {len(lines) - SHOWN} more files"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more] or ["the order of its files is another"]


def describe(file: dict[str, Any]) -> str:
    return f"{file['bytes']:,} bytes, sha256 {short(file['sha256'])}"


def short(digest: str) -> str:
    return digest[:8]


def version_changes(recorded: dict[str, str]) -> list[str]:
    """The libraries that are others now than a run was begun with."""
    now = library_versions()
    names: Iterable[str] = sorted(recorded.keys() | now.keys())
    return [f"{n} {recorded.get(n, 'none')} -> {now.get(n, 'none')}" for n in names if recorded.get(n) != now.get(n)]
