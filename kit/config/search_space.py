"""What a search may choose, from sweep overrides; a trial of it, composed from a copy of the configuration."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from kit.config import compose
from kit.config.compose import Composed
from kit.errors import KitError
from kit.storage.atomic_folder import atomic_folder, staging_path
from kit.system import paths

TrialValue = str | int | float
INF = math.inf


@dataclass
class Dimension:
    """What a search may choose for one key: the strings of `choices`, or a number from `low` to `high`."""

    choices: list[str] = field(default_factory=list)
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False


@dataclass
class Search:
    """A search: the run that all its trials share, what they may change, and where the configuration came from."""

    base: Composed
    fixed: list[str]
    space: dict[str, Dimension]
    folders: list[Path]
    run_file: Path | None


def given_search_space(base: Composed, others: bool) -> dict[str, str]:
    """hparams_search.search_space; what the kit's own file suggests only where nobody else says anything."""
    space = (base.tree.get("hparams_search") or {}).get("search_space")
    if not isinstance(space, dict):
        return {}
    suggested = {}
    for layer in base.layers:
        for key, (place, written) in layer.items():
            if place.startswith("hparams_search/"):
                suggested[key.removeprefix("hparams_search.search_space.")] = written
    own = {key: value for key, value in space.items() if suggested.get(key) != str(value)}
    return own if own or others else space


def to_dimension(override: Override) -> Dimension:
    """A sweep override as what a search can sample; KitError where it cannot."""
    value, key, line = override.value(), str(override.key_or_group), str(override.input_line).lstrip("+")
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if not isinstance(low, int | float) or not isinstance(high, int | float) or not -INF < low < high < INF:
            text = f"{line}: an interval needs two numbers, the smaller first"
            raise KitError(text, key, f"{key}=interval(LOW,HIGH)")
        whole = isinstance(low, int) and isinstance(high, int)
        result = Dimension(low=low, high=high, log="log" in value.tags, whole=whole)
    elif isinstance(value, RangeSweep):
        numbers = list(value.range())
        log = "log" in value.tags
        whole = all(isinstance(n, int) for n in numbers)
        if not numbers or value.step <= 0:
            raise KitError(f"{line}: the range is empty, or goes down", key, f"{key}=range(LOW,HIGH,STEP)")
        result = Dimension([], float(numbers[0]), float(numbers[-1]), None if log else value.step, log, whole)
    elif isinstance(value, ChoiceSweep | Glob):
        return Dimension([str(v) for v in override.sweep_string_iterator()])
    else:
        fix = "choice(8,16), range(8,65,8), interval(0,1), int(interval(4,64)), tag(log, interval(1e-5,1e-3))"
        raise KitError(f"{line} is one value: a search chooses from several", key, fix)
    if result.log and result.low <= 0:
        raise KitError(f"{line}: a logarithm needs numbers above 0", key, f"{key}=interval(LOW,HIGH)")
    return result


def snapshot_configuration(search: Search, folder: Path) -> None:
    """Copy the configuration folders: what a later trial is composed from, whatever is edited meanwhile."""
    with atomic_folder(folder, staging_path(folder), fsync=False) as staging:
        shutil.copytree(paths.CONF, staging / "hydra_conf")  # links become files
        shutil.copytree(paths.DS_CONFIGS, staging / "ds_configs")
        for number, source in enumerate(search.folders):
            shutil.copytree(source, staging / f"own-{number}")


def compose_trial(search: Search, values: dict[str, TrialValue], copy: Path | None = None) -> Composed:
    """A trial of a search; `copy` is the snapshot to compose it from, which must be in use."""
    compose.register_with_hydra()
    chosen = [f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in values.items()]
    own = sorted(copy.glob("own-*"), key=lambda f: int(f.name.partition("-")[2])) if copy else search.folders
    overrides = [*search.fixed, *compose.parse_overrides(chosen, folders=own)[0]]
    return compose.compose_overrides(overrides, search.run_file, own, overrides)
