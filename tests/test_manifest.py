"""A folder is complete or it is seen not to be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from kit.storage import atomic_folder, manifest


def make(folder, content=b"abc", step=1):
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(content)
    (folder / "sub" / "state.pt").write_bytes(b"state")
    manifest.write_manifest(folder, kind="checkpoint", step=step, plan="p", tensors=2, parameters=3)
    return folder


def test_written_and_read(tmp_path):
    folder = make(tmp_path / "checkpoint-1")
    found = manifest.read_manifest(folder)
    assert found["format"] == 1 and found["kind"] == "checkpoint" and found["base"] is None
    assert found["files"]["weights.bin"] == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert list(found["files"]) == ["sub/state.pt", "weights.bin"]
    assert manifest.verify_folder(folder) == []


def test_extra_files_are_no_fault(tmp_path):
    folder = make(tmp_path / "a")
    assert manifest.holds_only_a_save(folder)
    (folder / "notes.txt").write_text("mine")
    assert manifest.verify_folder(folder) == []
    assert not manifest.holds_only_a_save(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "weights.bin").unlink(), "is missing"),
        (lambda f: (f / "weights.bin").write_bytes(b"ab"), "has 2 bytes, the manifest says 3"),
        (lambda f: (f / "weights.bin").write_bytes(b"abd"), "differs from the file that was saved"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1, "files"'), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest of format 1"),
        (lambda f: (f / "manifest.json").write_text('{"format": 2}'), "not a manifest of format 1"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1, "files": {"a": 1}}'), "does not list"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path, damage, said):
    folder = make(tmp_path / "checkpoint-1")
    damage(folder)
    problems = manifest.verify_folder(folder)
    assert len(problems) == 1 and said in problems[0]


def test_a_manifest_cannot_point_outside(tmp_path):
    folder = make(tmp_path / "a")
    found = json.loads((folder / "manifest.json").read_text())
    found["files"]["../b"] = {"bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(found))
    assert "outside the folder" in manifest.verify_folder(folder)[0]


def test_an_atomic_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "deep" / "checkpoint-1"
    staging = atomic_folder.staging_path(target)
    with atomic_folder.atomic_folder(target, staging) as folder:
        (folder / "weights.bin").write_bytes(b"old")
        assert folder == staging and not target.exists()
    with pytest.raises(RuntimeError), atomic_folder.atomic_folder(target, staging) as folder:
        (folder / "weights.bin").write_bytes(b"half")
        raise RuntimeError
    assert (target / "weights.bin").read_bytes() == b"old"
    with atomic_folder.atomic_folder(target, staging) as folder:
        (folder / "weights.bin").write_bytes(b"new")
    assert (target / "weights.bin").read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["checkpoint-1"]


def test_a_failed_rename_brings_the_old_one_back(tmp_path, monkeypatch):
    final = make(tmp_path / "a")
    staging = make(tmp_path / ".staging-a", b"new")
    rename = os.rename

    def fails(source, target):
        if source == staging:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        atomic_folder.replace_folder(staging, final)
    assert manifest.verify_folder(final) == [] and (final / "weights.bin").read_bytes() == b"abc"


def test_a_save_into_a_folder_of_others(tmp_path):
    final = tmp_path / "out"
    (final / "checkpoint-1").mkdir(parents=True)
    (final / "notes.txt").write_text("mine")
    with atomic_folder.atomic_folder(final, tmp_path / ".staging-out", move=manifest.move_save_into) as staging:
        make(staging)
    assert manifest.verify_folder(final) == [] and (final / "notes.txt").exists() and (final / "checkpoint-1").is_dir()
    assert not (tmp_path / ".staging-out").exists()


def test_newest_complete_passes_over_the_damaged(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path / f"checkpoint-{step}", step=step)
    (tmp_path / "checkpoint-11").mkdir()
    make(tmp_path / ".staging-checkpoint-12")
    make(tmp_path / "checkpoint-13-old")
    (tmp_path / "checkpoint-10" / "weights.bin").write_bytes(b"abX")
    found = manifest.newest_complete_checkpoint(tmp_path)
    assert found.path == tmp_path / "checkpoint-9"
    assert [s.split()[0] for s in found.skipped] == ["checkpoint-11", "checkpoint-10"]
    assert manifest.newest_complete_checkpoint(tmp_path / "absent") == (None, [])


def test_leftovers(tmp_path):
    make(tmp_path / ".staging-checkpoint-3")
    make(tmp_path / ".trash-checkpoint-1")
    make(tmp_path / ".replaced-adapter", b"old")
    make(tmp_path / ".replaced-model", b"old")
    make(tmp_path / "model", b"new")
    (tmp_path / ".hydra").mkdir()
    assert len(atomic_folder.remove_leftovers(tmp_path)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hydra", "adapter", "model"]
    assert (tmp_path / "adapter" / "weights.bin").read_bytes() == b"old"
    assert (tmp_path / "model" / "weights.bin").read_bytes() == b"new"


def test_discard(tmp_path):
    atomic_folder.discard_folder(make(tmp_path / "checkpoint-1"))
    assert list(tmp_path.iterdir()) == []


def test_light():
    code = (
        "import sys, kit.storage.manifest, kit.training.signals; print({'torch', 'transformers'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
