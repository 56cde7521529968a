"""A repository of the Hub: its commit, its files, and which of them a run needs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import KitError
from kit.inspection import hub_dataset
from kit.schema.run_plan import Model
from kit.storage import hub_cache, safetensors_header

TEXT_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # config, tokenizer, templates
PICKLE_SUFFIXES = {".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".msgpack"}
HUB_TIMEOUT = 30.0  # seconds for the Hub's first answer; downloads have HF_HUB_DOWNLOAD_TIMEOUT


@dataclass
class HubRepo:
    """One repository of a run: which files of which commit, and what of them is in the cache."""

    key: str  # what names it: model.name_or_path, tokenizer.name_or_path, dataset.path, dataset.eval_path
    name: str
    kind: str
    revision: str | None  # as asked for
    choose: Callable[[HubRepo], list[str]] = lambda repo: []
    commit: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of every file of the commit
    files: list[str] = field(default_factory=list)  # the files to have
    gated: bool = False

    @property
    def snapshot(self) -> Path:
        return hub_cache.cached_repo_folder(self.name, self.kind) / "snapshots" / self.commit

    @property
    def missing(self) -> list[str]:
        return [f for f in self.files if not (self.snapshot / f).is_file()]

    @property
    def pin(self) -> str:
        """The override that holds the run to this commit; empty for dataset.eval_path, which has no revision."""
        return "" if self.key == "dataset.eval_path" else f"{self.key.partition('.')[0]}.revision={self.commit}"


def query_hub(repo: HubRepo) -> None:
    """Ask the Hub for the commit behind the revision and its files with their sizes, and choose among them."""
    from huggingface_hub import HfApi

    info: Any
    try:
        ask = HfApi().dataset_info if repo.kind == hub_cache.DATASET else HfApi().model_info
        info = ask(repo.name, revision=repo.revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:  # the Hub's refusals and the network's
        raise explain_error(error, repo) from None
    repo.commit, repo.gated = info.sha, bool(info.gated)
    repo.sizes = {f.rfilename: f.size or 0 for f in info.siblings}
    repo.files = repo.choose(repo)


def model_file_chooser(model: Model) -> Callable[[HubRepo], list[str]]:
    """Chooses config, tokenizer and weights: never a pickle, never code unless the command line asked for it."""

    def choose(repo: HubRepo) -> list[str]:
        around = choose_tokenizer_files(repo) + [
            f for f in repo.sizes if f.endswith(".py") and model.trust_remote_code
        ]
        if safetensors_header.CONFIG not in repo.sizes:
            adapter = "adapter_config.json" in repo.sizes
            content = "an adapter" if adapter else "no model of transformers"
            problem = f"{repo.name} is {content}: no {safetensors_header.CONFIG}"
            raise KitError(problem, repo.key, "name its base model" if adapter else "name another repository")
        if model.random_init:
            return around
        if safetensors_header.INDEX in repo.sizes:
            try:
                shards = sorted(set(json.loads(read_repo_file(repo, safetensors_header.INDEX))["weight_map"].values()))
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
        pickles = [f for f in repo.sizes if Path(f).suffix in PICKLE_SUFFIXES]
        if pickles:
            raise KitError(
                f"{repo.name} has no safetensors, only pickles ({pickles[0]}), which can run code when they are read",
                repo.key,
                f"hf download {repo.name} --local-dir DIR, kit convert DIR OUT, model.name_or_path=OUT; "
                "or a pull request of the repository holds them: model.revision=refs/pr/NUMBER",
            )
        raise KitError(f"{repo.name} holds no weights", repo.key, "name another repository")

    return choose


def choose_tokenizer_files(repo: HubRepo) -> list[str]:
    """Everything but weights that stands at the top of a model's repository, and further chat templates."""
    return [
        f
        for f in repo.sizes
        if Path(f).suffix in TEXT_SUFFIXES and ("/" not in f or f.startswith("additional_chat_templates/"))
    ]


def data_file_chooser(config: str | None) -> Callable[[HubRepo], list[str]]:
    """Chooses the files of one configuration, with what describes them; scripts stay where they are."""

    def choose(repo: HubRepo) -> list[str]:
        card = read_repo_file(repo, hub_dataset.CARD) if hub_dataset.CARD in repo.sizes else ""
        files = hub_dataset.configuration_files(list(repo.sizes), card, config)
        if not files:
            scripts = [f for f in repo.sizes if f.endswith(".py")]
            problem = f"{repo.name} holds no data files" + (f", only a script ({scripts[0]})" if scripts else "")
            fix = "the Hub's own conversion, where it has one: dataset.revision=refs/convert/parquet"
            raise KitError(problem, repo.key, fix if scripts else "name another data set")
        return [f for f in repo.sizes if f == hub_dataset.CARD or Path(f).name in hub_dataset.NO_DATA] + files

    return choose


def read_repo_file(repo: HubRepo, name: str) -> str:
    """A small file of the repository, read without touching the cache."""
    from huggingface_hub import hf_hub_download

    try:
        with tempfile.TemporaryDirectory() as folder:
            file = hf_hub_download(repo.name, name, repo_type=repo.kind, revision=repo.commit, local_dir=folder)
            return Path(file).read_text(encoding="utf-8", errors="replace")
    except Exception as error:  # the Hub's refusals and the network's
        raise explain_error(error, repo) from None


def explain_error(error: Exception, repo: HubRepo) -> Exception:
    """In words, unless it is a KitError or the disk's own, which the command line words itself."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, KitError):
        return error
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, HfHubHTTPError):
        return error
    return hub_cache.hub_error(error, repo.name, repo.kind, repo.key)
