"""Checkpoints that are complete or invisible: write, commit, verify, find, prune, restore.

In: a DeepSpeed engine, a `TrainState` and what belongs to the run. Out: checkpoints/step-00001200/, whose manifest.json
is written last, names every file with size and digest, and becomes visible by one rename. There is no pointer file.
"""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from prosparse import shards
from prosparse.config import Save
from prosparse.group import agree, from_rank_zero, gathered, rank_and_world, shared

FORMAT = 2
ENGINE = "engine"  # the folder of the ranks' own files
NAME = re.compile(r"step-\d{8}")


@dataclass
class TrainState:
    """The whole resumable state beside the engine's.

    step: optimizer steps applied; window: windows consumed (applied, skipped or dropped); tokens: of applied steps;
    dropped_windows: those that a rewind leaves out; controller, guard: what the control of λ and the spike guard
    remember.
    """

    step: int = 0
    window: int = 0
    tokens: int = 0
    skipped: int = 0
    dropped_windows: list[int] = field(default_factory=list)
    controller: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, float] = field(default_factory=dict)
    tracking_id: str | None = None


@dataclass
class Saved:
    """A committed checkpoint: bytes of all ranks, seconds that training waited, seconds until it was complete."""

    folder: Path
    bytes: int
    blocked_seconds: float
    seconds: float


@dataclass
class _Pending:
    folder: Path
    manifest: dict
    began: float
    blocked_seconds: float
    files: "Future[dict[str, dict]]"  # this rank's, on the disk


class Saver:
    """Writes the checkpoints of a run, one at a time: `begin`, later `commit`. All ranks call both.

    `begin` returns when the bytes were handed to the disk's cache, or, with `how.asynchronous`, when they were copied
    to host memory; syncing, and then writing too, goes on beside the training. Nothing is visible before `commit`.
    """

    def __init__(self, run_dir: Path, how: Save) -> None:
        self.run_dir, self.how = run_dir, how
        self._worker = ThreadPoolExecutor(1, "save")
        self._host: dict[str, Tensor] = {}
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits for its commit."""
        return self._pending is not None

    @property
    def ready(self) -> bool:
        """Whether this rank's part of the pending checkpoint is on the disk, or has failed."""
        return self._pending is None or self._pending.files.done()

    def begin(
        self,
        engine: Any,
        state: TrainState,
        record: dict,
        write_skeleton: Callable[[Path], None],
        began: float | None = None,
    ) -> None:
        """Write the checkpoint of `state.step` to step-N.tmp; `began`: when training began to wait (perf_counter).

        `record` goes into the manifest; `write_skeleton(folder)` writes the model's config and tokenizer. An error of
        this rank's writing waits for `commit`, where all ranks raise it.
        """
        assert self._pending is None
        began, (rank, world) = began or time.perf_counter(), rank_and_world()
        final = self.run_dir / "checkpoints" / f"step-{state.step:08d}"
        temporary = final.with_suffix(".tmp")

        def start() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / ENGINE).mkdir(parents=True)

        from_rank_zero(start)
        tensors, metadata = shards.tensors_of(shards.outline(engine))
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        if self.how.asynchronous:
            tensors = self._copy(shards.filled(tensors, shards.pieces(engine)))
        manifest = {
            "format": FORMAT,
            "state": json.loads(json.dumps(asdict(state))),
            "ranks": world,
            "shapes": shards.shapes(engine),
            "adam_steps": shards.adam_steps(engine),
            **record,
        }

        def write() -> dict[str, dict]:
            name = _rank_file(rank)
            with closing(shards.pieces(engine)) as parts:  # not asked for any, if the tensors are copies
                files = {name: shards.write(temporary / name, tensors, metadata, parts)}
            if rank == 0:
                write_skeleton(temporary / "skeleton")
                for path in sorted((temporary / "skeleton").rglob("*")):
                    if path.is_file():
                        files[str(path.relative_to(temporary))] = shards.digest(path)
            return files

        def sync() -> dict[str, dict]:
            for name in (files := written.result()):
                shards.sync(temporary / name)
            return files

        written = self._worker.submit(write)
        if not self.how.asynchronous:
            wait([written])
        files = self._worker.submit(sync)
        self._pending = _Pending(final, manifest, began, time.perf_counter() - began, files)

    def commit(self) -> Saved:
        """Wait until every rank's part is on the disk, then make the checkpoint visible and prune old ones.

        OSError on every rank if one could not write: the checkpoint is gone then, earlier ones are untouched.
        """
        assert self._pending is not None
        began, pending, self._pending = time.perf_counter(), self._pending, None
        temporary = pending.folder.with_suffix(".tmp")
        try:
            parts = gathered(agree(pending.files.result))
            files = {name: entry for part in parts for name, entry in sorted(part.items())}
            from_rank_zero(lambda: _commit(temporary, pending.folder, pending.manifest | {"files": files}))
        except OSError as error:
            from_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise shared(OSError(f"{pending.folder} could not be saved: {error}")) from error
        from_rank_zero(lambda: _try_to_prune(self.run_dir, self.how))
        now, size = time.perf_counter(), sum(entry["size"] for entry in files.values())
        return Saved(pending.folder, size, pending.blocked_seconds + now - began, now - pending.began)

    def close(self) -> None:
        """Wait for the worker; a checkpoint that was not committed stays invisible."""
        self._worker.shutdown()

    def _copy(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors in host memory that is kept for the next time."""
        for name, tensor in tensors:
            if name not in self._host or self._host[name].shape != tensor.shape:
                self._host[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[name].copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return dict(self._host)


def restore(engine: Any, folder: Path, manifest: dict) -> None:
    """Fill the engine and the random generators from a verified checkpoint (all ranks call it).

    Ranks and ZeRO stage may be others than those that wrote it. ValueError if the model's parameters are.
    """

    def load() -> None:
        rank, told = rank_and_world()[0], difference(manifest["shapes"], shards.shapes(engine))
        if told is not None:
            raise ValueError(f"{folder} is of another model: {told}: mind model.source")
        shards.read_into(rank_files(folder, manifest), shards.pieces(engine, change=True))
        shards.set_adam_steps(engine, manifest["adam_steps"])
        if rank < manifest["ranks"]:
            with safe_open(folder / _rank_file(rank), "pt") as file:
                torch.set_rng_state(file.get_tensor("rng/cpu"))
                if torch.cuda.is_available() and "rng/cuda" in file.keys():  # noqa: SIM118  (it is no dict)
                    torch.cuda.set_rng_state(file.get_tensor("rng/cuda"))

    agree(load)
    shards.refresh(engine)


def rank_files(folder: Path, manifest: dict) -> list[Path]:
    """The files with the tensors, in the order of the ranks that wrote them."""
    return [folder / _rank_file(rank) for rank in range(manifest["ranks"])]


def gather(engine: Any) -> dict[str, Tensor]:
    """The trained weights on rank 0's CPU, one parameter at a time under ZeRO-3; empty on the other ranks."""
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank_and_world()[0] == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


# --- the folders of a run ---------------------------------------------------------------------------------------------


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first key in which two nested dicts differ, in words; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = (difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys)
        return next((part for part in parts if part is not None), None)
    return None if old == new else f"{path} was {old} and is now {new}"


class OtherFormat(ValueError):
    """A checkpoint that is whole and not this version's to read: nothing to pass over."""


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder; raises ValueError if there is none, or not as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        own = manifest.pop("xxh3_128")
    except OSError as error:
        raise ValueError(f"{folder} is no complete checkpoint: manifest.json: {error.strerror}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder} is damaged: manifest.json cannot be read") from error
    if own != _digest_of(manifest):
        raise ValueError(f"{folder} is damaged: manifest.json is not what was saved")
    if manifest["format"] != FORMAT:
        raise OtherFormat(f"{folder} has format {manifest['format']}, this version reads {FORMAT}: use the one it has")
    return manifest


def verify(folder: Path, rank: int = 0, world: int = 1) -> dict:
    """The manifest of a checkpoint whose files hold: every size, and the digests of this rank's share of them.

    Nothing else of the folder is opened before. Raises ValueError naming the first bad file.
    """
    manifest = read_manifest(folder)
    if NAME.fullmatch(folder.name) and int(folder.name[5:]) != manifest["state"]["step"]:
        raise ValueError(f"{folder} is damaged: its manifest.json is that of step {manifest['state']['step']}")
    for number, (name, entry) in enumerate(manifest["files"].items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder} is damaged: {name} lies outside of it")
        try:
            same = path.stat().st_size == entry["size"] and (number % world != rank or shards.digest(path) == entry)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} is damaged: {name} is missing") from error
        except OSError as error:
            raise ValueError(f"{folder} is damaged: {name} cannot be read ({error.strerror})") from error
        if not same:
            raise ValueError(f"{folder} is damaged: {name} is not the file that was saved")
    return manifest


def verify_together(folder: Path) -> dict:
    """`verify`, its digests shared among the ranks (all ranks call it)."""
    return agree(lambda: verify(folder, *rank_and_world()))


def find(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None; says on stderr which ones it passed over and why.

    Raises ValueError for checkpoints of another format, which are no reason to begin anew.
    """
    for folder in _readable(run_dir):
        try:
            verify(folder)
            return folder
        except ValueError as error:
            print(f"passing over a checkpoint: {error}", file=sys.stderr)
    return None


def find_together(run_dir: Path) -> tuple[Path, dict] | None:
    """`find`, with the manifest, its digests shared among the ranks (all ranks call it)."""
    for folder in from_rank_zero(lambda: _readable(run_dir)):
        try:
            return folder, verify_together(folder)
        except ValueError as error:
            if rank_and_world()[0] == 0:
                print(f"passing over a checkpoint: {error}", file=sys.stderr, flush=True)
    return None


def find_stage(run_dir: Path, stage: str) -> Path:
    """The checkpoint at the end of a stage; raises ValueError that lists the stages that have one."""
    ends: dict[str, Path] = {}
    for folder in _folders(run_dir):
        try:
            end = read_manifest(folder).get("stage_end")
        except ValueError:
            continue
        if end is not None:
            ends.setdefault(end, folder)
    if stage not in ends:
        raise ValueError(
            f"{run_dir} has no checkpoint of the end of stage {stage}; it has: {', '.join(ends) or 'none'}"
        )
    return ends[stage]


def supersede(run_dir: Path, step: int) -> None:
    """Set aside every checkpoint of a later step than the one a run goes on from, as step-N.superseded, -2, ..."""
    for folder in _folders(run_dir):
        if int(folder.name[5:]) > step:
            numbers = ["", *(f"-{n}" for n in range(2, 1000))]
            names = [folder.with_suffix(f".superseded{number}") for number in numbers]
            folder.rename(aside := next(name for name in names if not name.exists()))
            print(f"{folder} is of a later step: set aside as {aside.name}", file=sys.stderr, flush=True)


def bytes_used(run_dir: Path) -> int:
    """The bytes of a run's checkpoints, without those that were set aside."""
    folders = (folder for folder in (run_dir / "checkpoints").glob("step-*") if ".superseded" not in folder.name)
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def checkpoints_kept(steps: int, stage_ends: list[int], how: Save) -> int:
    """How many checkpoints lie on the disk at the end of `steps` steps, with the one that is being written."""
    saved = sorted({*range(how.every, steps + 1, how.every), *stage_ends})
    kept = {*saved[-how.keep :]}
    kept |= set(stage_ends) if how.keep_stages else set()
    kept |= {step for step in saved if how.keep_every and step % how.keep_every == 0}
    return len(kept) + 1


def _rank_file(rank: int) -> str:
    return f"{ENGINE}/rank-{rank:05d}.safetensors"


def _commit(temporary: Path, final: Path, manifest: dict) -> None:
    with open(temporary / "manifest.json", "w") as file:
        json.dump(manifest | {"xxh3_128": _digest_of(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        shards.sync(folder)
    os.rename(temporary, final)
    shards.sync(final.parent)


def _digest_of(manifest: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())


def _folders(run_dir: Path) -> list[Path]:
    """Every step-N, newest first; not what is temporary or set aside."""
    return sorted((f for f in (run_dir / "checkpoints").glob("step-*") if NAME.fullmatch(f.name)), reverse=True)


def _readable(run_dir: Path) -> list[Path]:
    """`_folders`, unless one of them is whole and of another format."""
    for folder in (folders := _folders(run_dir)):
        try:
            read_manifest(folder)
        except OtherFormat:
            raise
        except ValueError:  # damaged: told by whoever verifies
            continue
    return folders


def _try_to_prune(run_dir: Path, how: Save) -> None:
    """What cannot be removed (on NFS while somebody reads it) is told, and tried again after the next save."""
    try:
        _prune(run_dir, how)
    except OSError as error:
        print(f"an old checkpoint could not be removed: {error}", file=sys.stderr, flush=True)


def _prune(run_dir: Path, how: Save) -> None:
    assert how.keep >= 2
    complete = [folder for folder in _folders(run_dir) if (folder / "manifest.json").is_file()]
    for folder in complete[how.keep :]:
        step = int(folder.name[5:])
        every = how.keep_every is not None and step % how.keep_every == 0
        if not every and not (how.keep_stages and _may_be_stage_end(folder)):
            (folder / "manifest.json").unlink()  # invisible first: what a kill leaves of a removal is no checkpoint
            shutil.rmtree(folder)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        unfinished = NAME.fullmatch(folder.name) and not (folder / "manifest.json").is_file()
        if folder.suffix == ".tmp" or unfinished:
            shutil.rmtree(folder)


def _may_be_stage_end(folder: Path) -> bool:
    try:
        return read_manifest(folder).get("stage_end") is not None
    except ValueError:  # for now: who cannot read it does not remove it
        return True
