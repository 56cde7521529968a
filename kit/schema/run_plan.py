"""What a run is: `RunInput` is the composed tree, `RunPlan` the frozen result that every later step reads.

`trainer`, `peft`, `quantization` and `deepspeed` are dicts because their schema is the libraries' own (fields.py).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kit.errors import KitError, first_line

PLAN_FORMAT = 1
HOST_PATTERN = r"^[A-Za-z0-9:][A-Za-z0-9._:-]*$"  # a name or an address
FILTER_PATTERN = (
    r"^[A-Za-z0-9][A-Za-z0-9._-]*(:\d+(,\d+)*)?(@[A-Za-z0-9][A-Za-z0-9._-]*(:\d+(,\d+)*)?)*$"  # DeepSpeed's
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Strict):
    name_or_path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = "auto"  # auto: kit/inspection/attention.py; null: transformers' own choice
    trust_remote_code: bool = False
    random_init: bool = False  # weights drawn from trainer.seed instead of loaded: config.json is all that is needed
    pad_token: str | None = None  # a token of this base to pad with, where its tokenizer names none
    config: dict[str, Any] = Field(default_factory=dict)  # shape facts of config.json, used when the file is not here


class Tokenizer(Strict):
    name_or_path: str | None = None
    revision: str | None = None
    chat_template: str | None = None  # a name (TRL's templates, the kit's own) or a .jinja file
    pad_token: str | None = None
    eos_token: str | None = None
    bos_token: str | None = None
    added_tokens: list[str] = Field(default_factory=list)
    date: str | None = Field(
        default=None, pattern=r"^\d{4}-\d{2}-\d{2}$"
    )  # what a template that writes today's writes


FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "alpaca_prompt",
    "prompt_completion",
    "question_answer",
    "text",
    "tokenized",
]


class DataSource(Strict):
    """Rows of one data set: where they are and how they are read."""

    path: str | list[str]  # a file, a folder, a glob, a list of these, or a Hub id
    name: str | None = None  # configuration of a Hub data set
    revision: str | None = None
    split: str = "train"
    format: FormatName = "auto"
    columns: dict[str, str] = Field(default_factory=dict)  # our column: the file's column
    template: dict[str, str] = Field(
        default_factory=dict
    )  # our column: text with {their columns} in it (row_template)
    roles: dict[str, str] = Field(default_factory=dict)  # their role: system, user, assistant or tool
    limit: int | None = Field(default=None, ge=1)


class MixedSource(DataSource):
    """One of several data sets of a run."""

    weight: float | None = Field(default=None, gt=0)  # share of the rows drawn from it; null everywhere: all, in turn


class Dataset(DataSource):
    path: str | list[str] | None = None  # type: ignore[assignment]  # null where `mix` names the sets
    mix: list[MixedSource] = Field(default_factory=list)
    mix_until: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"  # of interleave_datasets, with weights
    eval_path: str | list[str] | None = None
    eval_split: str | None = None
    # Held out of `split` when there is no eval_path or eval_split: a share, or a number of rows. With both, validation
    # is evaluated while training and test after it; with test_size alone it serves for both.
    test_size: float | int | None = None
    validation_size: float | int | None = None
    seed: int = 42
    streaming: bool = False
    eval_limit: int | None = Field(default=None, ge=1)
    # Which tokens are in the loss; null: what trainer.assistant_only_loss and completion_only_loss say
    train_on: Literal["everything", "completion", "assistant_turns", "last_turn", "chosen_turns"] | None = None
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    max_bad_rows: float | int = Field(default=0.01, ge=0)  # on_bad_row=drop: more, as a share or a number, are refused
    on_long_row: Literal["truncate", "split", "drop", "refuse"] = "truncate"  # longer than trainer.max_length
    report_samples: int = Field(default=5, ge=0, le=5)  # rendered rows kept beside the prepared data


class Slurm(Strict):
    """A batch job; the patterns of what may stand in its script are those of kit/config/slurm.py."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = None
    time: str | Annotated[int, Field(strict=True)] | None = None  # strict: true is no minute
    mem: str | Annotated[int, Field(strict=True)] | None = None
    constraint: str | None = None
    exclude: str | None = None
    cpus_per_task: int | None = Field(default=None, ge=1)
    modules: list[str] = Field(default_factory=list)
    setup: list[str] = Field(default_factory=list)
    extra: list[str] = Field(default_factory=list)
    signal_seconds: int = Field(default=300, ge=1, le=65535)
    max_requeues: int = Field(default=10, ge=0)


class Launch(Strict):
    launcher: Literal["auto", "local", "deepspeed", "torchrun"] = "auto"
    num_gpus: int | Literal["auto"] = "auto"
    num_nodes: int | Literal["auto"] = 1
    hostfile: str | None = None
    include: str | None = Field(default=None, pattern=FILTER_PATTERN)
    exclude: str | None = Field(default=None, pattern=FILTER_PATTERN)
    no_ssh: bool = False
    node_rank: int | None = Field(default=None, ge=0)
    master_addr: str | None = Field(default=None, pattern=HOST_PATTERN)
    master_port: int | None = Field(default=None, ge=1, le=65535)
    script: str | None = None
    grace_seconds: float = Field(default=120, gt=0)
    build_seconds: float = Field(default=900, gt=0)
    ignore_memory_forecast: bool = False
    slurm: Slurm | None = None  # the run is a batch job


class Pruner(Strict):
    """Which trials of a search end early; the names are those of optuna's MedianPruner and SuccessiveHalvingPruner."""

    name: Literal["none", "median", "halving"] = "median"
    n_startup_trials: int = Field(default=2, ge=0)
    n_warmup_steps: int = Field(default=0, ge=0)
    min_resource: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=2, ge=2)


class HparamsSearch(Strict):
    """How `kit train -m` runs its trials, and how a search chooses them."""

    method: Literal["grid", "optuna"] = "grid"
    workers: Literal["cold", "warm"] = "cold"
    parallel: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    gpus_per_trial: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    metric: str | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    progress_seconds: float = Field(default=15, gt=0)
    n_trials: int = Field(default=20, ge=1)
    search_space: dict[str, str] = Field(default_factory=dict)  # dotted key: a sweep in Hydra's override grammar
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**31)  # numpy takes no other
    storage: Literal["sqlite", "journal"] = "sqlite"
    pruner: Pruner = Pruner()


class InitFrom(Strict):
    """The adapter that a run starts from: its folder (or a Hub id that is not here), its weights and their hash."""

    path: str
    weights: str | None = None
    sha256: str | None = None


class RunInput(Strict):
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    dataset: Dataset
    peft: dict[str, Any] = Field(default_factory=dict)
    quantization: dict[str, Any] = Field(default_factory=dict)
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    fsdp: dict[str, Any] = Field(default_factory=dict)
    trainer: dict[str, Any] = Field(default_factory=dict)
    launch: Launch = Launch()
    tracking: dict[str, Any] = Field(default_factory=dict)
    hparams_search: HparamsSearch = HparamsSearch()
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    runs_dir: str = "runs"
    global_batch_size: int | None = Field(default=None, ge=1)
    prompts: list[str] = Field(default_factory=list)
    rehearsal: bool | Literal["auto"] = "auto"


class MemoryOption(Strict):
    """One way to use a device's memory, with its forecast peak in bytes and the time of a step against the fastest."""

    activation_checkpointing: bool
    activation_checkpointing_kwargs: dict[str, Any] = Field(default_factory=dict)
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    bytes: int
    cost: float


class Documents(Strict):
    """What a run trains on in an epoch, as estimated from its first rows."""

    count: float
    mean: float  # tokens of one, cut as trainer.max_length and dataset.on_long_row say
    large: float  # share of those that fill more than half of a row, so that no two of them share one

    def packed_rows(self, max_length: int) -> float:
        """Return how many rows of `max_length` tokens they fill."""
        return self.count * max(self.mean / max_length, self.large)


class MemoryChoice(Strict):
    """The options of a run on its device, each needing less than the one before; the trainer has the chosen one."""

    device: str
    device_bytes: int
    options: list[MemoryOption]
    chosen: int = 0


class RunPlan(Strict):
    """A run with every value plain: no "auto", no interpolation, absolute paths. It crosses process borders."""

    format: Literal[1] = 1
    kit_version: str
    name: str
    hash: str
    run_dir: str
    recipe: str | None = None
    world_size: int
    global_batch_size: int
    precision: Literal["float32", "bfloat16", "float16"]
    model: Model
    tokenizer: Tokenizer
    dataset: Dataset
    peft: dict[str, Any] | None
    quantization: dict[str, Any] | None
    deepspeed: dict[str, Any] | None
    fsdp: dict[str, Any] | None
    trainer: dict[str, Any]
    launch: Launch
    train_on: str | None = None  # which tokens are in the loss, as resolved; null where the rows were not here
    tracking: dict[str, Any]
    prompts: list[str]
    rehearsal: bool | None = None  # null: decided where the number of steps is known
    init_from: InitFrom | None = None  # peft.init_from: whose weights the adapter starts with
    base: dict[str, Any] | None = None  # config_sha256 and fingerprint of the base weights, where they are here
    rows: int | None = None  # that the trainer draws in an epoch, where they were counted
    documents: Documents | None = None  # of an epoch, where the data is here
    memory: MemoryChoice | None = None  # null: the user's own values, or not yet chosen (the GPUs are elsewhere)
    notes: list[str] = Field(default_factory=list)
    warnings: list[dict[str, str]] = Field(default_factory=list)  # problem, where, fix and rule of each
    overrides: list[str] = Field(default_factory=list)
    provenance: dict[str, str] = Field(default_factory=dict)
    # The tree before resolution: `kit resume key=value` starts here.
    composed: dict[str, Any] = Field(default_factory=dict)

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)

    @property
    def zero_stage(self) -> int:
        return int((self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load_plan(path: str | Path) -> RunPlan:
    """Read plan.json (or the run directory that holds it); KitError where it is not one."""
    path = Path(path)
    path = path / "plan.json" if path.is_dir() else path
    try:
        return RunPlan.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KitError(f"there is no plan at {path}", fix="name a run directory made by `kit train`") from None
    except ValidationError as error:
        errors = error.errors()
        first = next((e for e in errors if e["loc"] == ("format",)), errors[0])
        key, fix = ".".join(map(str, first["loc"])), "freeze the run again: kit train, kit compose"
        if key == "format" and isinstance(first["input"], int):
            text = f"{path} is a plan of format {first['input']}, this kit reads {PLAN_FORMAT}"
            raise KitError(text, str(path), "the version of the kit that wrote it") from None
        raise KitError(f"{path} is not a plan: {key + ': ' if key else ''}{first['msg']}", str(path), fix) from None
    except (OSError, ValueError) as error:
        raise KitError(f"{path} cannot be read: {first_line(error)}", str(path), "check the path") from None


# Field classes: a change of an identity key is another run; extendable and machine keys may change on resume.
EXTENDABLE = {
    "trainer.max_steps",
    "trainer.num_train_epochs",
    "trainer.save_strategy",
    "trainer.save_steps",
    "trainer.save_total_limit",
    "trainer.eval_strategy",
    "trainer.eval_steps",
    "trainer.eval_delay",
    "trainer.logging_steps",
    "trainer.logging_strategy",
    "trainer.logging_first_step",
    "trainer.report_to",
    "trainer.run_name",
    "trainer.project",
    "prompts",
    "tracking",
    "dataset.report_samples",
}
MACHINE = {
    "runs_dir",
    "init_from.path",
    "launch",
    "rehearsal",
    "hparams_search",
    "model.attn_implementation",
    "trainer.use_liger_kernel",  # the same layers by other kernels, to rounding; `auto` asks what is installed here
    "quantization.bnb_4bit_quant_storage",  # the same bits under another dtype
    "trainer.use_cpu",
    "trainer.per_device_train_batch_size",
    "trainer.per_device_eval_batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.gradient_checkpointing",
    "trainer.activation_checkpointing",
    "trainer.activation_checkpointing_kwargs",
    "trainer.dataset_num_proc",
    "trainer.ddp_timeout",
    "deepspeed.zero_optimization",
    "deepspeed.file",
    "deepspeed.aio",
    "deepspeed.steps_per_print",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.train_batch_size",
    "deepspeed.gradient_accumulation_steps",
}


def field_class(key: str) -> Literal["identity", "extendable", "machine"]:
    """What changing `key` (dotted) means for a run that has already started."""
    prefixes = [key[: i if i > 0 else None] for i in [-1, *(n for n, c in enumerate(key) if c == ".")]]
    if any(p in EXTENDABLE for p in prefixes):
        return "extendable"
    if any(p in MACHINE for p in prefixes) or key.startswith("trainer.dataloader_"):
        return "machine"
    return "identity"


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value; lists and empty dicts are values."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values.update(leaves(value, f"{prefix}.{key}" if prefix else str(key)))
    return values


# Keys that came after the first runs: at these values a run has the name that it had without them.
ADDED_LATER = {
    "dataset.mix_until": "first_exhausted",
    "dataset.on_bad_row": "refuse",
    "dataset.max_bad_rows": 0.01,
    "dataset.on_long_row": "truncate",
}


def identity_hash(tree: dict[str, Any], global_batch_size: int) -> str:
    """8 hex digits over the identity keys of the resolved tree."""
    identity = {k: v for k, v in leaves(tree).items() if field_class(k) == "identity" and v not in (None, {}, [])}
    identity = {k: v for k, v in identity.items() if ADDED_LATER.get(k) != v}
    identity["global_batch_size"] = global_batch_size
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
