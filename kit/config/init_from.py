"""The keys `peft.init_from` and `peft.init_from_pickle`, taken out of the section peft: PEFT does not know them."""

from __future__ import annotations

from typing import Any, NamedTuple

from kit.errors import Problem

INIT_FROM, INIT_FROM_PICKLE = "peft.init_from", "peft.init_from_pickle"


class InitialAdapter(NamedTuple):
    """`peft.init_from` and `peft.init_from_pickle` as given."""

    name: str  # a folder or a Hub id
    pickle: bool


def take_init_from(peft: Any) -> tuple[Any, InitialAdapter | None, list[Problem]]:
    """Split the section peft into what PEFT knows and the kit's own keys."""
    if not isinstance(peft, dict) or not {"init_from", "init_from_pickle"} & peft.keys():
        return peft, None, []
    rest = {k: v for k, v in peft.items() if k not in ("init_from", "init_from_pickle")}
    name, pickle = peft.get("init_from"), peft.get("init_from_pickle", False)
    problems = []
    if not isinstance(name, str | None) or name == "":
        problems.append(
            Problem(
                f"{INIT_FROM} must be a folder or a Hub id, not {name!r}",
                INIT_FROM,
                f"{INIT_FROM}=RUN/adapter",
                "init-from",
            )
        )
    if not isinstance(pickle, bool):
        problems.append(
            Problem(
                f"{INIT_FROM_PICKLE} must be true or false, not {pickle!r}",
                INIT_FROM_PICKLE,
                f"{INIT_FROM_PICKLE}=true",
                "init-from",
            )
        )
    if name and "peft_type" not in rest:
        problems.append(
            Problem(
                f"peft=none, but {INIT_FROM} is given", INIT_FROM, "peft=lora, or merge the adapter first", "init-from"
            )
        )
    return rest, InitialAdapter(name, bool(pickle)) if name and not problems else None, problems
