"""Hydra's multirun (`kit train -m`): what its sweeper makes of the command line, handed on as composed trials.

The plugins are registered while a sweep runs, not installed: other Hydra programs of the same environment do not see
them. They start nothing: the launchers' room does, through the functions in `Job`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from hydra import main as hydra_main
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kit.config import compose
from kit.config.compose import Composed
from kit.config.search_space import Search, given_search_space, to_dimension
from kit.errors import DONE, ENVIRONMENT, REFUSED, STOPPED, KitError, Problem
from kit.system import paths

HYDRA_ERRORS = (HydraException, OmegaConfBaseException, OSError, yaml.YAMLError)


@dataclass
class SweepPoint:
    """One point of a grid: what was swept, and its composed tree or why there is none."""

    number: int
    values: dict[str, str]
    composed: Composed | None = None
    problems: list[Problem] = field(default_factory=list)


@dataclass
class MultirunJob:
    """Hydra's task function. A stock launcher calls it for each point; the kit's takes all of them together."""

    one: Callable[[Composed], int]  # train a point; the exit code
    grid: Callable[[list[SweepPoint]], list[tuple[int, float | None]]]  # exit code and metric of each
    search: Callable[[Search], int]
    run_file: Path | None = None
    codes: list[int] = field(default_factory=list)
    begun: bool = False  # Hydra has composed what all points share, and found sweeper and launcher

    def __call__(self, cfg: DictConfig) -> int:
        self.begun = True
        compose.register_with_hydra()  # a launcher may have brought this object to another process
        if STOPPED in self.codes:  # Ctrl-C ends a multirun, not only the point that was running
            return STOPPED
        hydra = HydraConfig.get()
        composed = compose.to_composed(cfg, hydra, [str(o) for o in hydra.overrides.task], self.run_file)
        self.codes.append(self.one(composed))
        return self.codes[-1]


class KitLauncher(Launcher):
    """Composes every job before the first starts, and hands them on together."""

    __module__ = "hydra_plugins.kit"  # Hydra takes plugins of that package only

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.loader, self.job, self.config = hydra_context.config_loader, task_function, config
        self.job.begun = True

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        setup_globals()
        swept = swept_keys([list(o) for o in job_overrides], list(self.config.hydra.overrides.task))
        points = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            pairs = [o.lstrip("+").partition("=")[::2] for o in overrides]
            point = SweepPoint(number, {key: value for key, value in pairs if key in swept})
            points.append(point)
            try:
                point.composed = compose_sweep_job(self.loader, self.config, list(overrides), self.job.run_file)
            except KitError as error:
                point.problems = error.problems
        results = self.job.grid(points)
        self.job.codes += [code for code, _ in results]
        returns = []
        for code, value in results:
            returns.append(JobReturn(status=JobStatus.COMPLETED))
            # A sweeper from elsewhere wants the metric; the kit's has the codes already.
            returns[-1].return_value = code if value is None else value
        return returns


class KitSweeper(Sweeper):
    """Hydra's basic sweeper, and a search where hparams_search.method says so."""

    __module__ = "hydra_plugins.kit"

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, {} if params is None else params

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.hydra_context, self.config, self.job = hydra_context, config, task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        unregister_plugins()  # both are made; a stock launcher would take Hydra's register with it to another process

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None and self.launcher is not None
        loader = self.hydra_context.config_loader
        typed = {a.lstrip("+").partition("=")[0] for a in arguments}
        written = compose.parse_overrides(
            [f"{k}={v}" for k, v in sweeper_params(self.params).items() if k not in typed], folders=self.own_folders()
        )[0]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides([*written, *arguments])
        ours = isinstance(self.launcher, KitLauncher)
        searches = OmegaConf.select(self.config, "hparams_search.method") == "optuna"
        if problems := [p for o in overrides if o.is_sweep_override() and (p := sweep_problem(o, searches))]:
            raise KitError(problems)
        if searches:
            if not ours:
                raise KitError("a search starts its trials itself", "command line", "leave out hydra/launcher=")
            self.job.codes.append(self.job.search(self.read_search(overrides)))
            return None
        if not ours:  # its jobs are composed wherever it likes: what cannot be is better known now
            results: list[JobReturn] = []
            for batch in BasicSweeper.split_arguments(overrides, self.max_batch_size):
                self.validate_batch_is_legal(batch)
                results += self.launcher.launch(batch, initial_job_idx=len(results))
            self.job.codes = [r.return_value for r in results]
            return results
        [batch] = BasicSweeper.split_arguments(overrides, None)
        return self.launcher.launch(batch, initial_job_idx=0)

    def read_search(self, overrides: list[Override]) -> Search:
        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        fixed = [
            f"{o.get_key_element()}={o.get_value_element_as_str()}" if o.value_type else str(o.input_line)
            for o in overrides
            if not o.is_sweep_override()
        ]
        base = compose_sweep_job(loader, self.config, fixed, self.job.run_file)
        given = [o for o in overrides if o.is_sweep_override()]
        written, _ = compose.parse_overrides(
            [f"{key}={value}" for key, value in given_search_space(base, bool(given)).items()],
            folders=self.own_folders(),
        )
        fixed += [o for o in written if o == "dataset=none"]  # what a search over files stands on
        written = [o for o in written if o != "dataset=none"]
        sweeps = [*OverridesParser.create(config_loader=loader).parse_overrides(written), *given]
        fixed = [f for f in fixed if not f.lstrip("+").startswith("hydra")]
        space = {str(o.key_or_group): to_dimension(o) for o in sweeps}
        return Search(base, fixed, space, self.own_folders(), self.job.run_file)

    def own_folders(self) -> list[Path]:
        """The folders with groups of a user's own."""
        assert self.config is not None
        sources = [Path(s.path) for s in self.config.hydra.runtime.config_sources if s.schema == "file"]
        return [s for s in sources if s.resolve() != paths.CONF.resolve()]


def sweeper_params(params: Any) -> dict[str, Any]:
    """hydra.sweeper.params as they stand in a file."""
    if isinstance(params, Mapping):
        return dict(params)
    raise KitError("hydra.sweeper.params must hold key: values lines", "hydra.sweeper.params", "peft.r: 8,16")


def sweep_problem(override: Override, searches: bool) -> Problem | None:
    """Why nothing can be swept that way; None where it can."""
    key, line = str(override.key_or_group), str(override.input_line).lstrip("+")
    if key.partition(".")[0] == "hparams_search" or key == "runs_dir":
        searched = key.removeprefix("hparams_search.search_space.")
        fix = f"{searched}={line.partition('=')[2]}" if searched != key else "give one value"
        text = f"{key} belongs to the whole sweep: it has one value"
        return Problem(text, f"command line: {line}", fix, "override")
    if isinstance(override.value(), IntervalSweep) and not searches:
        fix = f"{key}=choice(A,B), {key}=range(START,END,STEP), or hparams_search=optuna"
        return Problem("a grid cannot try all of an interval", f"command line: {line}", fix, "override")
    return None


PLUGINS: dict[str, type[Any]] = {"launcher": KitLauncher, "sweeper": KitSweeper}
SETTINGS = {"sweeper": {"max_batch_size": None, "params": None}}


def register_plugins(groups: list[str]) -> None:
    """Make the plugins known to Hydra, in the package where it looks for them."""
    try:
        package = importlib.import_module("hydra_plugins")
    except ImportError:  # no plugin is installed
        package = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        package.__path__ = []
    package.kit = sys.modules["hydra_plugins.kit"] = ModuleType("hydra_plugins.kit")  # type: ignore[attr-defined]
    for group in groups:
        plugin = PLUGINS[group]
        setattr(package.kit, plugin.__name__, plugin)
        node = {"_target_": f"{plugin.__module__}.{plugin.__name__}", **SETTINGS.get(group, {})}
        ConfigStore.instance().store(group=f"hydra/{group}", name="kit", node=OmegaConf.create(node), provider="kit")
        Plugins.instance().register(plugin)


def unregister_plugins() -> None:
    register = Plugins.instance()
    for plugin in PLUGINS.values():
        register.class_name_to_class.pop(f"{plugin.__module__}.{plugin.__name__}", None)
        for known in register.plugin_type_to_subclass_list.values():
            if plugin in known:
                known.remove(plugin)


def run_multirun(args: list[str], job: MultirunJob) -> int:
    """Hand `-m` and the overrides to Hydra's own main; the highest exit code of the jobs."""
    compose.register_with_hydra()
    overrides, job.run_file = compose.parse_overrides([a for a in args if not a.startswith("-")], flags=args)
    keys = {o.partition("=")[0] for o in overrides}
    ours = [group for group in PLUGINS if f"hydra/{group}" not in keys]
    register_plugins(ours)
    overrides = [*(f"hydra/{group}=kit" for group in ours), *overrides]
    flags = [a for a in args if a.startswith("-") or a in compose.values_of_flags(args)]
    argv, sys.argv = sys.argv, ["kit train", *flags, *overrides]
    try:
        with raising_hydra_errors():
            hydra_main(config_path=str(paths.CONF), config_name="train", version_base="1.3")(job)()
    except SystemExit as stop:
        return REFUSED if stop.code else DONE
    except HYDRA_ERRORS as error:
        if not job.begun or not isinstance(error, OSError) or isinstance(error, HydraException):
            raise compose.hydra_refusal(error, args) from None
        text, place = error.strerror or str(error), str(error.filename or "runs_dir")  # a full disk, say
        fix = "mend that; the same command continues with what is missing"
        raise KitError(f"{place}: {text}", place, fix, code=ENVIRONMENT) from None
    except (TypeError, ValueError, RecursionError) as error:
        if job.begun:
            raise
        raise compose.hydra_type_error(error, args) from None  # Hydra's own code on what it did not expect
    finally:
        sys.argv = argv
        unregister_plugins()
    return max(job.codes, default=DONE)  # stopped before failed before refused


@contextmanager
def raising_hydra_errors() -> Iterator[None]:
    """Hydra prints an error and ends the process, unless this is set."""
    name = "HYDRA_FULL_ERROR"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def compose_sweep_job(loader: Any, master: DictConfig, overrides: list[str], run_file: Path | None) -> Composed:
    """One job of a sweep, composed by Hydra's loader; KitError where it cannot be."""
    try:
        config = loader.load_sweep_config(master, overrides)
        return compose.to_composed(config, config.hydra, [str(o) for o in config.hydra.overrides.task], run_file)
    except HYDRA_ERRORS as error:
        raise compose.hydra_refusal(error, overrides) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise compose.hydra_type_error(error, overrides) from None


def swept_keys(jobs: list[list[str]], typed: list[str]) -> list[str]:
    """The keys that tell the jobs apart; of a single job those that were not typed as they stand there."""
    pairs = [dict(o.lstrip("+").partition("=")[::2] for o in job) for job in jobs]
    if len(jobs) == 1:
        return [o.lstrip("+").partition("=")[0] for o in jobs[0] if o not in typed]
    keys = list(dict.fromkeys(key for job in pairs for key in job))
    return [key for key in keys if len({job.get(key) for job in pairs}) > 1]
