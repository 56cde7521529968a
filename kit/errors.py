"""Every refusal is a list of problems, each with where it was found and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

DONE, REFUSED, ENVIRONMENT, FAILED, STOPPED = 0, 2, 3, 4, 75  # exit codes; 75 = EX_TEMPFAIL, "requeue me"

LESS_MEMORY = (  # what to do about an "out of memory"
    "lower trainer.per_device_train_batch_size or trainer.max_length, set trainer.gradient_checkpointing=true, or "
    "take the next of deepspeed=zero2, zero3, zero3_offload"
)


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, its type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (file, key or row), the fix, and the rule (`kit check --explain`)."""

    problem: str
    where: str = ""
    fix: str = ""
    rule: str = ""

    def __str__(self) -> str:
        lines = [self.problem]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        if self.rule:
            lines.append(f"  rule:  {self.rule}")
        return "\n".join(lines)


def with_rule(problems: Iterable[Problem], rule: str) -> list[Problem]:
    """The problems with `rule` where they name none: what a reader of files found does not know whose file it is."""
    return [p if p.rule else replace(p, rule=rule) for p in problems]


class KitError(Exception):
    """A refusal that a person can act on; `code` is the exit code of the command."""

    def __init__(
        self,
        problem: str | Iterable[Problem],
        where: str = "",
        fix: str = "",
        *,
        code: int = REFUSED,
        rule: str = "",
    ) -> None:
        if isinstance(problem, str):
            problem = [Problem(problem, where, fix, rule)]
        self.problems = list(problem)
        self.code = code
        super().__init__("\n".join(str(p) for p in self.problems))

    def to_json(self) -> list[dict[str, str]]:
        return [asdict(p) for p in self.problems]
