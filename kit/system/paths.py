"""Where the configuration folders and the cache are, in a checkout and in a wheel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE if (PACKAGE / "hydra_conf").is_dir() else PACKAGE.parent
CONF = ROOT / "hydra_conf"
DS_CONFIGS = ROOT / "ds_configs"
RECIPES = (CONF / "recipe").resolve()


@contextmanager
def use_config_folder(folder: Path) -> Iterator[None]:
    """While the block runs, the configuration is that of `folder`, a copy of `hydra_conf` and `ds_configs`."""
    global ROOT, CONF, DS_CONFIGS, RECIPES
    before = ROOT, CONF, DS_CONFIGS, RECIPES
    CONF = folder / "hydra_conf"
    ROOT, DS_CONFIGS, RECIPES = folder, folder / "ds_configs", (CONF / "recipe").resolve()
    try:
        yield
    finally:
        ROOT, CONF, DS_CONFIGS, RECIPES = before


def kit_cache_folder() -> Path:
    """The kit's own cache: $KIT_CACHE or ~/.cache/kit."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("KIT_CACHE") or os.path.join(base, "kit")).absolute()


def resolve_kit_dir(name: str) -> str:
    """What `${kit.dir:NAME}` in a config stands for: `cache`, `recipes` or `ds_configs`."""
    return str({"cache": kit_cache_folder(), "recipes": RECIPES, "ds_configs": DS_CONFIGS}[name])


def is_made_by_quickstart(path: str) -> bool:
    """Whether a path is one that `make quickstart` fills."""
    return Path(path).absolute().is_relative_to(kit_cache_folder() / "quickstart")
