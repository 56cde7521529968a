"""Which files make a split: the same as `datasets` finds in the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.errors import KitError
from kit.inspection import hub_dataset

CONFIGS = "---\nconfigs:\n- config_name: {0}\n  data_files:\n{1}---\n"
SPLITS = "  - split: train\n    path: ['a/**', 'b/part-?.jsonl']\n  - split: test\n    path: 'c/[0-9]*.jsonl'\n"
LAYOUTS = {
    "one file": (["rows.jsonl"], ""),
    "names": (["train.jsonl", "test.jsonl", "valid-1.jsonl"], ""),
    "folders": (["train/1.jsonl", "train/2.jsonl", "dev/1.jsonl"], ""),
    "shards": (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], ""),
    "no split in the names": (["one.jsonl", "two/three.jsonl", "dataset_infos.json"], ""),
    "listed": (["a/1.jsonl", "a/x/2.jsonl", "b/part-1.jsonl", "b/part-22.jsonl", "c/7.jsonl", "c/x.jsonl"],
               CONFIGS.format("default", SPLITS)),
    "a pattern alone": (["x/1.jsonl", "y/1.jsonl"], CONFIGS.format("default", "    x/*.jsonl\n")),
    "in a folder": (["x/1.jsonl", "y/1.jsonl"], CONFIGS.format("mine", "    '**/*.jsonl'\n  data_dir: y\n")),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_splits_are_those_of_datasets(layout, tmp_path: Path):
    from datasets import load_dataset_builder

    names, card = layout
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n' if name.endswith(".jsonl") else "{}")
    if card:
        (tmp_path / "README.md").write_text(card)
    found = load_dataset_builder(str(tmp_path)).config.data_files
    splits = {str(split): sorted(str(Path(f).relative_to(tmp_path)) for f in files) for split, files in found.items()}
    assert splits
    for split, expected in splits.items():
        assert sorted(hub_dataset.split_files(names, card, None, split)) == expected, split
    everything = sorted(f for files in splits.values() for f in files)
    assert sorted(hub_dataset.configuration_files(names, card, None)) == everything


def test_a_choice_is_asked_for_and_checked():
    card = CONFIGS.format("a", "    a.jsonl\n- config_name: b\n  data_files: b.jsonl\n")
    names = ["a.jsonl", "b.jsonl", "run.py", ".hidden.jsonl"]
    assert hub_dataset.configuration_files(names, card, "b") == ["b.jsonl"]
    for name in (None, "c"):
        with pytest.raises(KitError, match="one of a, b"):
            hub_dataset.configuration_files(names, card, name)
    assert hub_dataset.configuration_files(names, "---\n[broken\n---\n", None) == ["a.jsonl", "b.jsonl"]
    assert hub_dataset.split_files(names, CONFIGS.format("a", "    '[z-a].jsonl'\n"), None, "train") == []


def test_what_datasets_has_prepared_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets.naming import camelcase_to_snakecase

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for name in ("chat", "OpenChat-v2", "HTMLPages", "data2Text"):
        assert not hub_dataset.is_prepared(f"org/{name}")
        (tmp_path / f"org___{camelcase_to_snakecase(name)}" / "default" / "0.0.0" / "abc").mkdir(parents=True)
        assert hub_dataset.is_prepared(f"org/{name}")


def test_a_snapshot_counts_only_whole_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of another tool, without the commit's listing, may hold a part: it is not taken for the data set."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--org--chat"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "1.jsonl").write_text("{}")
    assert hub_dataset.find_dataset_snapshot("org/chat", None, "a" * 40) is None
    listing = repo / "trees" / f"{'a' * 40}.json"
    listing.parent.mkdir()
    listing.write_text('{"format_version": 1, "files": {"1.jsonl": {}, "2.jsonl": {}, "run.py": {}}}')
    assert hub_dataset.find_dataset_snapshot("org/chat", None, "a" * 40) is None
    (snapshot / "2.jsonl").write_text("{}")
    assert hub_dataset.find_dataset_snapshot("org/chat", None, "a" * 40) == snapshot
    assert hub_dataset.find_dataset_snapshot("org/chat", None, None) is None  # no branch is noted
