"""`kit fetch`: what a run needs from the Hub, into the Hub cache, where there is a network."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from kit import api
from kit.errors import DONE, ENVIRONMENT, KitError
from kit.inspection import hub_dataset
from kit.schema.run_plan import Dataset, Model, Tokenizer
from kit.storage import hub_cache, safetensors_header
from kit.storage.json_files import atomic_write_text
from kit.system import dependencies, paths

AROUND = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # config, tokenizer, templates
PICKLES = {".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".msgpack"}
THREADS = 4
TIMEOUT = 30.0  # seconds for the Hub's first answer; downloads have HF_HUB_DOWNLOAD_TIMEOUT


@dataclass
class Repo:
    """One repository of a run: which files of which commit, and what of them is in the cache."""

    key: str  # what names it: model.name_or_path, tokenizer.name_or_path, dataset.path, dataset.eval_path
    name: str
    kind: str
    revision: str | None  # as asked for
    choose: Callable[[Repo], list[str]] = lambda repo: []
    commit: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of every file of the commit
    files: list[str] = field(default_factory=list)  # the files to have
    gated: bool = False

    @property
    def snapshot(self) -> Path:
        return hub_cache.repo_folder(self.name, self.kind) / "snapshots" / self.commit

    @property
    def missing(self) -> list[str]:
        return [f for f in self.files if not (self.snapshot / f).is_file()]

    @property
    def pin(self) -> str:
        """The override that holds the run to this commit; empty for dataset.eval_path, which has no revision."""
        return "" if self.key == "dataset.eval_path" else f"{self.key.partition('.')[0]}.revision={self.commit}"


def fetch(*args: str, config_dir: str | None = None, dry_run: bool = False) -> int:
    """Bring model, tokenizer and data of `[run.yaml] key=value ...` into the Hub cache. KitError: 2, or 3."""
    model, tokenizer, dataset = sections(args, config_dir)
    repos, local = wanted(model, tokenizer, dataset)
    for key, name in local:
        say(f"here      {name} ({key})")
    if not repos:
        say("nothing   to fetch")
        return DONE
    need_hub()
    if not sys.stderr.isatty():
        no_bars()
    refused: list[KitError] = []
    for repo in repos:
        try:
            look(repo)
            print_repo(repo)
        except KitError as error:
            refused.append(error)
    if refused:
        raise KitError([p for error in refused for p in error.problems], code=min(e.code for e in refused))
    check_disk(repos)
    if dry_run:
        return DONE
    for repo in repos:
        download(repo)
    for repo in repos:
        finish(repo)
    if pins := [repo.pin for repo in repos if repo.pin]:
        say(f"pin it    {' '.join(dict.fromkeys(pins))}")
    say("then      HF_HUB_OFFLINE=1 kit train ...")
    return DONE


def sections(args: tuple[str, ...], config_dir: str | None) -> tuple[Model | None, Tokenizer, Dataset | None]:
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


def need_hub() -> None:
    """KitError (3) where huggingface_hub is not installed, or may not ask the Hub."""
    if hub_cache.offline():
        raise KitError("HF_HUB_OFFLINE is set: nothing can be fetched", "environment", "unset it", code=ENVIRONMENT)
    if not dependencies.installed("huggingface_hub"):
        fix = "make setup in a checkout, or pip install huggingface_hub"
        raise KitError("huggingface_hub is not installed", fix=fix, code=ENVIRONMENT)


def wanted(
    model: Model | None, tokenizer: Tokenizer, dataset: Dataset | None
) -> tuple[list[Repo], list[tuple[str, str]]]:
    """The repositories that a run needs, and what it has on this machine as (key, name)."""
    named: list[Repo] = []
    if model:
        named.append(
            Repo("model.name_or_path", model.name_or_path, hub_cache.MODEL, model.revision, model_files(model))
        )
    if tokenizer.name_or_path:
        revision = tokenizer.revision
        named.append(
            Repo("tokenizer.name_or_path", tokenizer.name_or_path, hub_cache.MODEL, revision, tokenizer_files)
        )
    if dataset:
        choose = data_files(dataset.name)
        named.append(Repo("dataset.path", dataset.path, hub_cache.DATASET, dataset.revision, choose))
        if dataset.eval_path and dataset.eval_path != dataset.path:
            named.append(Repo("dataset.eval_path", dataset.eval_path, hub_cache.DATASET, None, data_files(None)))
    repos = [r for r in named if hub_cache.looks_like_id(r.name)]
    local = [(r.key, r.name) for r in named if r not in repos]
    return repos, [(k, f"{n}, which make quickstart makes" if is_promised(n) else n) for k, n in local]


def is_promised(name: str) -> bool:
    return paths.made_by_quickstart(name) and not Path(name).exists()


def look(repo: Repo) -> None:
    """Ask the Hub for the commit behind the revision and its files with their sizes, and choose among them."""
    from huggingface_hub import HfApi

    info: Any
    try:
        ask = HfApi().dataset_info if repo.kind == hub_cache.DATASET else HfApi().model_info
        info = ask(repo.name, revision=repo.revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:  # the Hub's refusals and the network's
        raise problem_with(error, repo) from None
    repo.commit, repo.gated = info.sha, bool(info.gated)
    repo.sizes = {f.rfilename: f.size or 0 for f in info.siblings}
    repo.files = repo.choose(repo)


def model_files(model: Model) -> Callable[[Repo], list[str]]:
    """Chooses config, tokenizer and weights: never a pickle, never code unless the command line asked for it."""

    def choose(repo: Repo) -> list[str]:
        around = tokenizer_files(repo) + [f for f in repo.sizes if f.endswith(".py") and model.trust_remote_code]
        if safetensors_header.CONFIG not in repo.sizes:
            adapter = "adapter_config.json" in repo.sizes
            content = "an adapter" if adapter else "no model of transformers"
            problem = f"{repo.name} is {content}: no {safetensors_header.CONFIG}"
            raise KitError(problem, repo.key, "name its base model" if adapter else "name another repository")
        if model.random_init:
            return around
        if safetensors_header.INDEX in repo.sizes:
            try:
                shards = sorted(set(json.loads(read_file(repo, safetensors_header.INDEX))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise KitError(
                    f"{safetensors_header.INDEX} of {repo.name} cannot be read", repo.key, "name another"
                ) from None
            if absent := [s for s in shards if s not in repo.sizes]:
                problem = f"{repo.name} lacks {', '.join(absent)}, which its index names"
                raise KitError(problem, repo.key, "name another")
            return around + shards
        if safetensors_header.SINGLE in repo.sizes:
            return [*around, safetensors_header.SINGLE]
        pickles = [f for f in repo.sizes if Path(f).suffix in PICKLES]
        if pickles:
            raise KitError(
                f"{repo.name} has no safetensors, only pickles ({pickles[0]}), which can run code when they are read",
                repo.key,
                f"hf download {repo.name} --local-dir DIR, kit convert DIR OUT, model.name_or_path=OUT; "
                "or a pull request of the repository holds them: model.revision=refs/pr/NUMBER",
            )
        raise KitError(f"{repo.name} holds no weights", repo.key, "name another repository")

    return choose


def tokenizer_files(repo: Repo) -> list[str]:
    """Everything but weights that stands at the top of a model's repository, and further chat templates."""
    return [
        f
        for f in repo.sizes
        if Path(f).suffix in AROUND and ("/" not in f or f.startswith("additional_chat_templates/"))
    ]


def data_files(config: str | None) -> Callable[[Repo], list[str]]:
    """Chooses the files of one configuration, with what describes them; scripts stay where they are."""

    def choose(repo: Repo) -> list[str]:
        card = read_file(repo, hub_dataset.CARD) if hub_dataset.CARD in repo.sizes else ""
        files = hub_dataset.files_of(list(repo.sizes), card, config)
        if not files:
            scripts = [f for f in repo.sizes if f.endswith(".py")]
            problem = f"{repo.name} holds no data files" + (f", only a script ({scripts[0]})" if scripts else "")
            fix = "the Hub's own conversion, where it has one: dataset.revision=refs/convert/parquet"
            raise KitError(problem, repo.key, fix if scripts else "name another data set")
        return [f for f in repo.sizes if f == hub_dataset.CARD or Path(f).name in hub_dataset.NO_DATA] + files

    return choose


def read_file(repo: Repo, name: str) -> str:
    """A small file of the repository, read without touching the cache."""
    from huggingface_hub import hf_hub_download

    try:
        with tempfile.TemporaryDirectory() as folder:
            file = hf_hub_download(repo.name, name, repo_type=repo.kind, revision=repo.commit, local_dir=folder)
            return Path(file).read_text(encoding="utf-8", errors="replace")
    except Exception as error:  # the Hub's refusals and the network's
        raise problem_with(error, repo) from None


def no_bars() -> None:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def check_disk(repos: list[Repo]) -> None:
    """KitError (3) where the missing bytes do not fit on the disk of the cache."""
    need = sum(repo.sizes[f] for repo in repos for f in repo.missing)
    place = next(p for p in [hub_cache.cache(), *hub_cache.cache().absolute().parents] if p.exists())
    free = shutil.disk_usage(place).free
    say(f"disk      {size(need)} to fetch, {size(free)} free in {hub_cache.cache()}")
    if need > free:
        raise KitError(
            f"{size(need)} are to be fetched, {size(free)} are free in {hub_cache.cache()}",
            "HF_HOME",
            f"free {size(need - free)}, or export HF_HOME=FOLDER on a larger disk, for the run too",
            code=ENVIRONMENT,
        )


def download(repo: Repo) -> None:
    """The missing files, each whole or not at all."""
    from huggingface_hub import hf_hub_download

    forget_partial(repo)
    missing = sorted(repo.missing, key=repo.sizes.__getitem__)  # what is refused is refused before the big files
    pool = ThreadPoolExecutor(THREADS)
    try:
        get = partial(hf_hub_download, repo.name, repo_type=repo.kind, revision=repo.commit)
        jobs = {pool.submit(get, file): file for file in missing}
        for number, job in enumerate(as_completed(jobs), 1):
            job.result()
            if not sys.stderr.isatty():  # there each file has a bar of its own
                say(f"fetched   {number}/{len(missing)} {jobs[job]} {size(repo.sizes[jobs[job]])}")
    except KeyboardInterrupt:
        os._exit(130)  # leaving in order would wait for the files that the threads are at
    except Exception as error:  # the Hub's refusals and the network's; a full disk is the system's
        raise problem_with(error, repo) from None
    finally:
        pool.shutdown(cancel_futures=True)


def finish(repo: Repo) -> None:
    """Note the commit's listing, by which an offline look sees what is missing, and the name of the revision."""
    from huggingface_hub import snapshot_download

    no_bars()
    names = [escape(f) for f in repo.files]
    try:  # every file is there: this asks for the listing alone
        snapshot_download(repo.name, repo_type=repo.kind, revision=repo.commit, allow_patterns=names)
    except Exception as error:
        raise problem_with(error, repo) from None
    if repo.revision != repo.commit:
        note_ref(repo)
    if repo.missing or hub_cache.find_snapshot(repo.name, repo.kind, repo.revision) != repo.snapshot:
        raise KitError(f"{repo.name} is not whole in {hub_cache.cache()}", repo.key, "run it again", code=ENVIRONMENT)
    if repo.kind == hub_cache.DATASET and hub_cache.listing(repo.snapshot) is None:
        problem = "this huggingface_hub keeps no listing of a commit, without which offline data may be a part"
        raise KitError(problem, repo.key, "pip install -U huggingface_hub", code=ENVIRONMENT)


def forget_partial(repo: Repo) -> None:
    """Remove what killed downloads left: huggingface_hub names every try anew, and goes on with none of them."""
    for file in (hub_cache.repo_folder(repo.name, repo.kind) / "blobs").glob("*.????????.incomplete"):
        if time.time() - file.stat().st_mtime > 3600:  # one that is at work writes every few seconds
            file.unlink(missing_ok=True)


def note_ref(repo: Repo) -> None:
    """Write refs/<revision>, by which the cache knows a branch's commit: last, so that it names a whole snapshot."""
    ref = hub_cache.repo_folder(repo.name, repo.kind) / "refs" / (repo.revision or "main")
    ref.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(ref, repo.commit)


def problem_with(error: Exception, repo: Repo) -> Exception:
    """In words, unless it is a KitError or the disk's own, which the command line words itself."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, KitError):
        return error
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, HfHubHTTPError):
        return error
    return hub_cache.explain(error, repo.name, repo.kind, repo.key)


def print_repo(repo: Repo) -> None:
    total, there = (sum(map(repo.sizes.__getitem__, f)) for f in (repo.files, set(repo.files) - set(repo.missing)))
    line = f"{repo.key.partition('.')[0]:<9} {repo.name} at {repo.commit[:12]}: {len(repo.files)} files, {size(total)}"
    say(line + (f", {size(there)} of it here" if there else "") + (", gated" if repo.gated else ""))
    for name in sorted(repo.missing):
        say(f"          {name} {size(repo.sizes[name])}")


def size(number: float) -> str:
    """Bytes in decimal units, as the Hub's pages give them."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:,.3g} TB" if number < 1000 else f"{number:,.0f} TB"


def say(line: str) -> None:
    print(line, flush=True)
