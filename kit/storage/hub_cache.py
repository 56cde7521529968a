"""The Hub's cache on this disk, looked at without huggingface_hub, and the Hub's refusals in words.

Layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kit.errors import ENVIRONMENT, REFUSED, KitError, first_line

MODEL, DATASET = "model", "dataset"  # huggingface_hub's repo_type
TRUE_WORDS = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its switches

# Set before a library is imported that reads them; what the user's own environment says stays.
NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it transformers, TRL, gradio_client
    "DO_NOT_TRACK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets counts loads with a request of its own
    "GRADIO_ANALYTICS_ENABLED": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def disable_telemetry() -> None:
    """Switch telemetry off in this process and in all that it starts."""
    for key, value in NO_TELEMETRY.items():
        os.environ.setdefault(key, value)


def is_offline() -> bool:
    """Whether the environment forbids to ask the Hub."""
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in TRUE_WORDS


def hub_home(env: Mapping[str, str] = os.environ) -> str:
    """The folder that holds huggingface_hub's cache and token."""
    return env.get("HF_HOME") or os.path.join(
        env.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )


def has_token(env: Mapping[str, str] = os.environ) -> bool:
    """Whether huggingface_hub would find a token; it is not read."""
    file = Path(os.path.expanduser(env.get("HF_TOKEN_PATH") or os.path.join(hub_home(env), "token")))
    return bool(env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN")) or file.is_file()


def is_hub_id(name: str) -> bool:
    """Whether a name can be a repository's and is no path on this disk."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name)) and not Path(name).exists()


def hub_cache_folder(env: Mapping[str, str] = os.environ) -> Path:
    """The folder that huggingface_hub would use."""
    return Path(os.path.expanduser(env.get("HF_HUB_CACHE") or os.path.join(hub_home(env), "hub")))


def cached_repo_folder(repo: str, kind: str) -> Path:
    return hub_cache_folder() / f"{kind}s--{repo.replace('/', '--')}"


def find_snapshot(repo: str, kind: str, revision: str | None = None) -> Path | None:
    """The folder of a repository's files at a revision, None where it is not in the cache."""
    folder, ref_name = cached_repo_folder(repo, kind), revision or "main"
    try:
        ref = folder / "refs" / ref_name
        snapshot = folder / "snapshots" / (ref.read_text().strip() if ref.is_file() else ref_name)
        return snapshot if snapshot.is_dir() else None
    except (OSError, ValueError):  # a name that is no file name
        return None


def cached_file_list(snapshot: Path) -> list[str] | None:
    """All files that the commit of a snapshot has on the Hub, as huggingface_hub noted them; None without a note."""
    try:
        noted = json.loads((snapshot.parent.parent / "trees" / f"{snapshot.name}.json").read_text(encoding="utf-8"))
        return list(noted["files"]) if noted["format_version"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fetch_command(key: str, repo: str, revision: str | None = None) -> str:
    """What to type where there is a network."""
    pin = f" {key.split('.')[0]}.revision={revision}" if revision else ""
    return f"where there is a network: kit fetch {key}={repo}{pin}"


def hub_error(error: Exception, repo: str, kind: str, key: str) -> KitError:
    """A refusal of the Hub, or of the network on the way there, in words: problem, `key`, what to do.

    REFUSED (2) where the name or the revision is wrong, ENVIRONMENT (3) where access or the network is.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the reason why the Hub was not asked stands behind it
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == DATASET else ''}{repo}"
    noun = "data set" if kind == DATASET else "model"
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    login = "hf auth login, or export HF_TOKEN=..."

    def refusal(problem: str, fix: str, code: int = ENVIRONMENT) -> KitError:
        return KitError(problem, key, fix, code=code)

    if isinstance(error, hub.GatedRepoError):
        if status == 401 or not get_token():
            return refusal(f"{repo} is gated, and you are not logged in", f"ask for access at {page}, then {login}")
        fix = f"ask at {page}; a fine-grained token must also be allowed to read gated repositories"
        return refusal(f"{repo} is gated, and your account has no access to it", fix)
    if isinstance(error, hub.RevisionNotFoundError):
        fix = f"a branch, tag or commit of {page}/commits/main"
        return KitError(f"{repo} has no such revision", f"{key.partition('.')[0]}.revision", fix)
    if isinstance(error, hub.RepositoryNotFoundError):
        if get_token():
            problem = f"there is no {noun} {repo}, or your account may not see it"
            return refusal(problem, f"check the name at {page}", REFUSED)
        problem = f"there is no {noun} {repo}, or it is private and you are not logged in"
        return refusal(problem, f"check the name at {page}; if it is private, {login}", REFUSED)
    if isinstance(error, hub.RemoteEntryNotFoundError):
        return refusal(f"{repo} lacks a file that is needed: {first_line(error)}", f"look at {page}", REFUSED)
    if isinstance(error, hub.HFValidationError):
        return refusal(f"{repo} is no name of a {noun}: {first_line(error)}", "ORGANISATION/NAME", REFUSED)
    if isinstance(error, hub.OfflineModeIsEnabled):
        fix = f"unset HF_HUB_OFFLINE, or {fetch_command(key, repo)}"
        return refusal(f"{repo} is not here, and HF_HUB_OFFLINE is set", fix)
    if status == 401:
        return refusal("the Hub does not know your token", login)
    if status == 403:
        return refusal(f"your account may not read {repo}", f"ask at {page}; the token must be allowed to read it")
    if status == 429:
        return refusal("the Hub says that too many requests came from here", "wait some minutes and run it again")
    if status is not None:
        return refusal(f"the Hub answered {status}: {first_line(error)}", "run it again later; what is here stays")
    problem = f"{constants.ENDPOINT} cannot be reached: {first_line(error)}"
    return refusal(problem, "check network, proxy and HF_ENDPOINT, and run it again: whole files that are here stay")
