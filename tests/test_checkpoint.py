"""Folders of checkpoints: which are found, which are kept, whose they are."""

import json
import os
from pathlib import Path

import pytest

from prosparse import checkpoint, lock, shards
from prosparse.config import Save


def make(run_dir: Path, step: int, stage_end: str | None = None) -> Path:
    """A checkpoint as `Saver` leaves it, with one file."""
    temporary, final = (run_dir / "checkpoints" / f"step-{step:08d}{end}" for end in (".tmp", ""))
    (temporary / "engine").mkdir(parents=True)
    (temporary / "engine" / "rank-00000.safetensors").write_bytes(os.urandom(64))
    files = {"engine/rank-00000.safetensors": shards.digest(temporary / "engine" / "rank-00000.safetensors")}
    manifest = {
        "format": checkpoint.FORMAT,
        "state": {"step": step},
        "stage_end": stage_end,
        "ranks": 1,
        "files": files,
    }
    checkpoint._commit(temporary, final, manifest)
    return final


def rewrite(folder: Path, **changes) -> None:
    manifest = checkpoint.read_manifest(folder) | changes
    (folder / "manifest.json").write_text(json.dumps(manifest | {"xxh3_128": checkpoint._digest_of(manifest)}))


def test_every_kind_of_damage_is_named_and_passed_over(tmp_path, capsys):
    good = make(tmp_path, 1)
    manifest = "manifest.json"

    def flip(path: Path, place: int) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)

    shard = "engine/rank-00000.safetensors"
    damages = {
        "flipped": (lambda f: flip(f / shard, 5), f"{shard} is not the file that was saved"),
        "cut": (lambda f: (f / shard).write_bytes((f / shard).read_bytes()[:-1]), f"{shard} is not the file"),
        "gone": (lambda f: (f / shard).unlink(), f"{shard} is missing"),
        "other": (lambda f: (f / shard).write_bytes((good / shard).read_bytes()), f"{shard} is not the file"),
        "no manifest": (lambda f: (f / manifest).unlink(), "is no complete checkpoint: manifest.json: No such file"),
        "half a manifest": (lambda f: (f / manifest).write_text((f / manifest).read_text()[:99]), "cannot be read"),
        "a changed manifest": (
            lambda f: (f / manifest).write_text((f / manifest).read_text().replace('"step": 2', '"step": 3')),
            "manifest.json is not what was saved",
        ),
        "another's manifest": (lambda f: (f / manifest).write_bytes((good / manifest).read_bytes()), "that of step 1"),
        "a way out": (lambda f: rewrite(f, files={"../../x": {"size": 0}}), "../../x lies outside of it"),
    }
    for name, (damage, words) in damages.items():
        folder = make(tmp_path, 2)
        damage(folder)
        with pytest.raises(ValueError) as error:
            checkpoint.verify(folder)
        assert words in str(error.value), name
        assert checkpoint.find(tmp_path) == good and words in capsys.readouterr().err
        checkpoint.shutil.rmtree(folder)
    rewrite(make(tmp_path, 2), format=1)
    for reads in (checkpoint.find, checkpoint.find_together):  # whole, so no reason to go back or begin anew
        with pytest.raises(ValueError, match="has format 1, this version reads 2"):
            reads(tmp_path)


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (Save(keep=2, keep_stages=False), [9, 10]),
        (Save(keep=3, keep_stages=False), [8, 9, 10]),
        (Save(keep=2, keep_every=4, keep_stages=False), [4, 8, 9, 10]),
        (Save(keep=2), [3, 7, 9, 10]),
        (Save(keep=2, keep_every=5), [3, 5, 7, 9, 10]),
    ],
)
def test_the_newest_and_the_named_checkpoints_are_kept_and_leftovers_removed(tmp_path, how, left):
    ends = {3: "substitution", 7: "rise"}
    for step in range(1, 11):
        make(tmp_path, step, ends.get(step))
    (tmp_path / "checkpoints" / "step-00000011.tmp" / "engine").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    make(tmp_path, 99).rename(tmp_path / "checkpoints" / "step-00000099.superseded")
    checkpoint._prune(tmp_path, how)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in left] + ["step-00000099.superseded"]
    kept = checkpoint.checkpoints_kept(10, [3, 7], Save(1, how.keep, how.keep_every, how.keep_stages))
    assert kept == len(left) + 1  # and the one that is being written


def test_a_stage_is_found_by_its_name(tmp_path):
    make(tmp_path, 3, "substitution")
    make(tmp_path, 5)
    assert checkpoint.find_stage(tmp_path, "substitution").name == "step-00000003"
    with pytest.raises(ValueError, match="no checkpoint of the end of stage rise; it has: substitution"):
        checkpoint.find_stage(tmp_path, "rise")


def test_a_run_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.3)
    held = lock.claim(tmp_path)
    with pytest.raises(ValueError, match=rf"run_dir={tmp_path} is in use by process {os.getpid()} on .*STOP"):
        lock.claim(tmp_path)
    lock.release(tmp_path, held)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    lock.release(tmp_path, lock.claim(tmp_path))


def test_a_run_folder_that_a_rank_cannot_write_is_refused_and_let_go(tmp_path):
    stands_in_the_way = tmp_path / "checkpoints" / ".probe-0"
    stands_in_the_way.mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"run_dir={tmp_path} cannot be written on host .*: choose a folder that can"):
        lock.claim(tmp_path)
    stands_in_the_way.rmdir()
    lock.release(tmp_path, lock.claim(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
