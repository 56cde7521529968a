"""libyaml under OmegaConf, which has no setting for it: PyYAML's parser in Python takes 8 % of the time of a check.

What OmegaConf adds stays its own: resolvers, constructors and the refusal of doubled keys (its get_yaml_loader).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import omegaconf._utils
import yaml


@contextlib.contextmanager
def parse_with_libyaml() -> Iterator[None]:
    """Let OmegaConf parse YAML with libyaml within the block."""
    loader = libyaml_loader()
    with replaced(omegaconf._utils, "get_yaml_loader", lambda: loader):
        yield


@cache
def libyaml_loader() -> Any:
    """Return OmegaConf's loader over libyaml, or as it comes where PyYAML was built without libyaml."""
    with replaced(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        return omegaconf._utils.get_yaml_loader()


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute of a module another value within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
