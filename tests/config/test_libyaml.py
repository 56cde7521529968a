"""libyaml under OmegaConf gives what OmegaConf's own loader gives, and is gone after the block."""

from __future__ import annotations

from pathlib import Path

import omegaconf._utils
import pytest
import yaml
from omegaconf import OmegaConf

from kit.config.libyaml import libyaml_loader, parse_with_libyaml

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("hydra_conf/**/*.yaml"), *ROOT.glob("recipes/*.yaml")])
ODD = """
float: [2e-4, 1.0e-5, .5, 1_000.5, .inf, -.inf, 1e400, 0x1f, 1:30, 1:30.5]
text: [2024-01-01, yes, No, on, ~, null, "2e-4", '1', 1.2.3, é, '${x}', "???"]
block: |
  two
    lines
anchor: &a {k: [1, {n: true}]}
same: *a
"""


def test_libyaml_is_there():
    assert yaml.CSafeLoader in libyaml_loader().__mro__


@pytest.mark.parametrize("text", [*(f.read_text(encoding="utf-8") for f in FILES), ODD],
                         ids=[*(f.name for f in FILES), "odd values"])  # fmt: skip
def test_values_are_the_same(text: str, tmp_path: Path):
    file = tmp_path / "it.yaml"
    file.write_text(text, encoding="utf-8")
    expected = OmegaConf.to_yaml(OmegaConf.load(file))
    with parse_with_libyaml():
        assert OmegaConf.to_yaml(OmegaConf.load(file)) == expected


def test_a_doubled_key_is_refused_and_the_loader_put_back(tmp_path: Path):
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    before = omegaconf._utils.get_yaml_loader
    with pytest.raises(yaml.constructor.ConstructorError, match="duplicate key a"), parse_with_libyaml():
        OmegaConf.load(tmp_path / "twice.yaml")
    assert omegaconf._utils.get_yaml_loader is before and yaml.SafeLoader.__module__ == "yaml.loader"
