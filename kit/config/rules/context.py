"""Defines what a rule is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from kit.config.report import Report
from kit.inspection.model import Base
from kit.system.hardware import Gpu


@dataclass
class RuleContext:
    """A resolved run, as the rules see it."""

    plan: dict[str, Any]  # the resolved tree: model, dataset, peft, quantization, deepspeed, fsdp, trainer, launch
    report: Report
    base: Base
    row_kind: str | None  # messages | prompt_completion | text | tokenized, None where sets differ or are not here
    chats: bool | None  # whether a chat template renders the rows, None where they are not here
    world_size: int
    zero_stage: int
    precision: str
    on_cpu: bool = False
    gpus: tuple[Gpu, ...] = ()
    on_this_machine: bool = False  # the run is about to start on this machine
    few_rows: int | None = None  # of the data, where it is small enough to have been read whole

    @property
    def surely_on_cpu(self) -> bool:
        """Whether it runs on CPU, and not only because the machine that looks at the run has no GPU."""
        return self.on_cpu and (self.on_this_machine or self.report.chosen("trainer.use_cpu"))


Violations = Iterator[tuple[str, str, str]]  # (problem, key, fix)


@dataclass(frozen=True)
class Rule:
    """One thing that `kit check` refuses or warns of; `kit check --explain` tells it from explanations.yaml."""

    id: str
    source: str  # the library's issue (project#number) or file that makes the rule true
    keys: tuple[str, ...]  # what the rule reads
    check: Callable[[RuleContext], Violations] | None = None
    severity: Literal["refuse", "warn"] = "refuse"
    on_this_machine: bool = False  # it asks about the machine where the run starts
    warns_elsewhere: bool = False  # on_this_machine, but a machine that only looks at the run has a word to say too
    reported_by: str = ""  # of a rule without a check: the module of kit/ that reports it
