"""`kit fetch`: what a run needs from the Hub, into the Hub cache, where there is a network."""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from glob import escape
from pathlib import Path

from kit import api
from kit.errors import DONE, ENVIRONMENT, KitError
from kit.hub.repository import (
    HubRepo,
    choose_tokenizer_files,
    data_file_chooser,
    explain_error,
    model_file_chooser,
    query_hub,
)
from kit.schema.run_plan import Dataset, Model, Tokenizer
from kit.storage import hub_cache
from kit.storage.disk import format_size
from kit.storage.json_files import atomic_write_text
from kit.system import dependencies, paths

DOWNLOAD_THREADS = 4


def fetch(*args: str, config_dir: str | None = None, dry_run: bool = False) -> int:
    """Bring model, tokenizer and data of `[run.yaml] key=value ...` into the Hub cache. KitError: 2, or 3."""
    model, tokenizer, dataset = compose_sections(args, config_dir)
    repos, local = repositories_of_run(model, tokenizer, dataset)
    for key, name in local:
        print_line(f"here      {name} ({key})")
    if not repos:
        print_line("nothing   to fetch")
        return DONE
    require_hub()
    if not sys.stderr.isatty():
        silence_progress_bars()
    refused: list[KitError] = []
    for repo in repos:
        try:
            query_hub(repo)
            print_repo(repo)
        except KitError as error:
            refused.append(error)
    if refused:
        raise KitError([p for error in refused for p in error.problems], code=min(e.code for e in refused))
    check_cache_space(repos)
    if dry_run:
        return DONE
    for repo in repos:
        download_missing(repo)
    for repo in repos:
        record_snapshot(repo)
    if pins := [repo.pin for repo in repos if repo.pin]:
        print_line(f"pin it    {' '.join(dict.fromkeys(pins))}")
    print_line("then      HF_HUB_OFFLINE=1 kit train ...")
    return DONE


def compose_sections(args: tuple[str, ...], config_dir: str | None) -> tuple[Model | None, Tokenizer, Dataset | None]:
    """What the run names; a line that names only a model, or only data, will do."""
    from kit.config.compose import compose

    try:
        plan = api.compose(*args, config_dir=config_dir)
        return plan.model, plan.tokenizer, plan.dataset
    except KitError as error:
        absent = {p.problem.partition(".")[0] for p in error.problems}  # "model.name_or_path is not given"
        if any(p.rule != "missing" for p in error.problems):
            raise
        tree = compose(list(args), config_dir).tree
        model = None if "model" in absent else Model.model_validate(tree["model"])
        dataset = None if "dataset" in absent else Dataset.model_validate(tree["dataset"])
        tokenizer = Tokenizer.model_validate(tree["tokenizer"])
        if not (model or dataset or tokenizer.name_or_path):
            raise
        return model, tokenizer, dataset


def require_hub() -> None:
    """KitError (3) where huggingface_hub is not installed, or may not ask the Hub."""
    if hub_cache.is_offline():
        raise KitError("HF_HUB_OFFLINE is set: nothing can be fetched", "environment", "unset it", code=ENVIRONMENT)
    if not dependencies.is_installed("huggingface_hub"):
        fix = "make setup in a checkout, or pip install huggingface_hub"
        raise KitError("huggingface_hub is not installed", fix=fix, code=ENVIRONMENT)


def repositories_of_run(
    model: Model | None, tokenizer: Tokenizer, dataset: Dataset | None
) -> tuple[list[HubRepo], list[tuple[str, str]]]:
    """The repositories that a run needs, and what it has on this machine as (key, name)."""
    named: list[HubRepo] = []
    if model:
        named.append(
            HubRepo(
                "model.name_or_path", model.name_or_path, hub_cache.MODEL, model.revision, model_file_chooser(model)
            )
        )
    if tokenizer.name_or_path:
        revision = tokenizer.revision
        named.append(
            HubRepo(
                "tokenizer.name_or_path", tokenizer.name_or_path, hub_cache.MODEL, revision, choose_tokenizer_files
            )
        )
    for number, source in enumerate(dataset.mix if dataset else []):
        named += _data_repos(f"dataset.mix.{number}.path", source.path, source.name, source.revision)
    if dataset:
        named += _data_repos("dataset.path", dataset.path, dataset.name, dataset.revision)
        if dataset.eval_path and dataset.eval_path != dataset.path:
            named += _data_repos("dataset.eval_path", dataset.eval_path, None, None)
    repos = [r for r in named if hub_cache.is_hub_id(r.name)]
    local = [(r.key, r.name) for r in named if r not in repos]
    return repos, [(k, f"{n}, which make quickstart makes" if is_quickstart_path(n) else n) for k, n in local]


def _data_repos(key: str, path: str | list[str] | None, config: str | None, revision: str | None) -> list[HubRepo]:
    paths = [path] if isinstance(path, str) else path or []
    return [HubRepo(key, name, hub_cache.DATASET, revision, data_file_chooser(config)) for name in paths]


def is_quickstart_path(name: str) -> bool:
    return paths.is_made_by_quickstart(name) and not Path(name).exists()


def silence_progress_bars() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def check_cache_space(repos: list[HubRepo]) -> None:
    """KitError (3) where the missing bytes do not fit on the disk of the cache."""
    need = sum(repo.sizes[f] for repo in repos for f in repo.missing)
    place = next(
        p for p in [hub_cache.hub_cache_folder(), *hub_cache.hub_cache_folder().absolute().parents] if p.exists()
    )
    free = shutil.disk_usage(place).free
    print_line(f"disk      {format_size(need)} to fetch, {format_size(free)} free in {hub_cache.hub_cache_folder()}")
    if need > free:
        raise KitError(
            f"{format_size(need)} are to be fetched, {format_size(free)} are free in {hub_cache.hub_cache_folder()}",
            "HF_HOME",
            f"free {format_size(need - free)}, or export HF_HOME=FOLDER on a larger disk, for the run too",
            code=ENVIRONMENT,
        )


def download_missing(repo: HubRepo) -> None:
    """The missing files, each whole or not at all."""
    from huggingface_hub import hf_hub_download

    remove_partial_downloads(repo)
    missing = sorted(repo.missing, key=repo.sizes.__getitem__)  # what is refused is refused before the big files
    pool = ThreadPoolExecutor(DOWNLOAD_THREADS)
    try:
        get = partial(hf_hub_download, repo.name, repo_type=repo.kind, revision=repo.commit)
        jobs = {pool.submit(get, file): file for file in missing}
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            if not sys.stderr.isatty():  # there each file has a bar of its own
                print_line(f"fetched   {number}/{len(missing)} {jobs[job]} {format_size(repo.sizes[jobs[job]])}")
    except KeyboardInterrupt:
        os._exit(130)  # leaving in order would wait for the files that the threads are at
    except Exception as error:  # the Hub's refusals and the network's; a full disk is the system's
        raise explain_error(error, repo) from None
    finally:
        pool.shutdown(cancel_futures=True)


def record_snapshot(repo: HubRepo) -> None:
    """Note the commit's listing, by which an offline look sees what is missing, and the name of the revision."""
    from huggingface_hub import snapshot_download

    silence_progress_bars()
    names = [escape(f) for f in repo.files]
    try:  # every file is there: this asks for the listing alone
        snapshot_download(repo.name, repo_type=repo.kind, revision=repo.commit, allow_patterns=names)
    except Exception as error:
        raise explain_error(error, repo) from None
    if repo.revision != repo.commit:
        write_ref(repo)
    if repo.missing or hub_cache.find_snapshot(repo.name, repo.kind, repo.revision) != repo.snapshot:
        raise KitError(
            f"{repo.name} is not whole in {hub_cache.hub_cache_folder()}", repo.key, "run it again", code=ENVIRONMENT
        )
    if repo.kind == hub_cache.DATASET and hub_cache.cached_file_list(repo.snapshot) is None:
        problem = "this huggingface_hub keeps no listing of a commit, without which offline data may be a part"
        raise KitError(problem, repo.key, "pip install -U huggingface_hub", code=ENVIRONMENT)


def remove_partial_downloads(repo: HubRepo) -> None:
    """Remove what killed downloads left: huggingface_hub names every try anew, and goes on with none of them."""
    for file in (hub_cache.cached_repo_folder(repo.name, repo.kind) / "blobs").glob("*.????????.incomplete"):
        if time.time() - file.stat().st_mtime > 3600:  # one that is at work writes every few seconds
            file.unlink(missing_ok=True)


def write_ref(repo: HubRepo) -> None:
    """Write refs/<revision>, by which the cache knows a branch's commit: last, so that it names a whole snapshot."""
    ref = hub_cache.cached_repo_folder(repo.name, repo.kind) / "refs" / (repo.revision or "main")
    ref.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(ref, repo.commit)


def print_repo(repo: HubRepo) -> None:
    total, there = (sum(map(repo.sizes.__getitem__, f)) for f in (repo.files, set(repo.files) - set(repo.missing)))
    line = f"{repo.key.partition('.')[0]:<9} {repo.name} at {repo.commit[:12]}: {len(repo.files)} files"
    line += f", {format_size(total)}"
    print_line(line + (f", {format_size(there)} of it here" if there else "") + (", gated" if repo.gated else ""))
    for name in sorted(repo.missing):
        print_line(f"          {name} {format_size(repo.sizes[name])}")


def print_line(line: str) -> None:
    print(line, flush=True)
