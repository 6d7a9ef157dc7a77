"""Checkpoints that are complete or invisible: save, commit, verify, find, prune.

In: a DeepSpeed engine, a `TrainState` and what belongs to the run. Out: checkpoints/step-00001200/, whose manifest.json
is written last, names every file with size and digest, and becomes visible by one rename. There is no pointer file.
"""

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from prosparse.group import agree, from_rank_zero, together

ENGINE = "engine"  # the folder (DeepSpeed: tag) of the engine's own files
NAME = re.compile(r"step-\d{8}")


@dataclass
class TrainState:
    """The whole resumable state beside the engine's.

    step: optimizer steps applied; window: windows consumed (applied or skipped); tokens: tokens of applied steps.
    """

    step: int = 0
    window: int = 0
    tokens: int = 0
    skipped: int = 0
    tracking_id: str | None = None


def claim(run_dir: Path) -> None:
    """Make the run folder (all ranks call it); raises ValueError unless rank 0 can write it and every rank sees it."""
    probe = run_dir / ".probe"

    def write() -> str:
        try:
            (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe.write_text(token := uuid.uuid4().hex)
            return token
        except OSError as error:
            raise ValueError(
                f"run_dir={run_dir} cannot be written ({error.strerror}): choose a folder that can"
            ) from error

    def look() -> None:
        if not probe.is_file() or probe.read_text() != token:
            raise ValueError(f"run_dir={run_dir} is not the folder that rank 0 sees: choose one that all hosts share")

    token = from_rank_zero(write)
    try:
        agree(look)
    finally:
        if not dist.is_initialized() or dist.get_rank() == 0:
            probe.unlink()


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first key in which two nested dicts differ, in words; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in sorted({*old, *new}))
        return next((part for part in parts if part is not None), None)
    return None if old == new else f"{path} was {old} and is now {new}"


def save(
    engine: Any,
    run_dir: Path,
    state: TrainState,
    record: dict,
    write_skeleton: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write and commit the checkpoint of `state.step` (all ranks call it), then prune to the `keep` newest.

    `record` goes into the manifest; `write_skeleton(folder)` writes the model's config and tokenizer. The steps: write
    to step-N.tmp; hash and fsync every file, shared among the ranks; all ranks agree; manifest.json last; rename.
    If a rank cannot write, the run ends with its reason; earlier checkpoints are untouched then.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = run_dir / "checkpoints" / f"step-{state.step:08d}"
    temporary = final.with_suffix(".tmp")

    def start() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        engine.save_checkpoint(str(temporary), tag=ENGINE, save_latest=False)
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        save_file(generators, temporary / f"rng-rank{rank:05d}.safetensors")
        if rank == 0:
            write_skeleton(temporary / "skeleton")

    def written() -> list[str]:
        return sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())

    def commit(files: dict[str, dict]) -> None:
        manifest = {"format": 1, "state": asdict(state), "ranks": world, **record, "files": dict(sorted(files.items()))}
        with open(temporary / "manifest.json", "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        os.rename(temporary, final)
        _sync_folder(final.parent)
        _prune(run_dir, keep)

    from_rank_zero(start)
    together(write, f"saving {final}")
    files = from_rank_zero(written)[rank::world]
    share = agree(lambda: {name: _digest(temporary / name, flush=True) for name in files})
    shares: list[dict] = [share]
    if dist.is_initialized():
        shares = [{} for _ in range(world)]
        dist.all_gather_object(shares, share)
    from_rank_zero(lambda: commit({name: entry for part in shares for name, entry in part.items()}))
    return final


def restore(engine: Any, folder: Path) -> dict:
    """Load a verified checkpoint into the engine and the random generators (all ranks call it); return its manifest.

    Raises ValueError if a digest does not hold or the rank count differs, OSError if any rank cannot load.
    """
    manifest = from_rank_zero(lambda: verify(folder))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if manifest["ranks"] != world:
        raise ValueError(f"{folder} was written by {manifest['ranks']} ranks and this run has {world}: start as many")

    def load() -> None:
        path, _ = engine.load_checkpoint(str(folder), tag=ENGINE, load_lr_scheduler_states=False)
        if path is None:
            raise OSError("DeepSpeed found no checkpoint there")
        generators = load_file(folder / f"rng-rank{rank:05d}.safetensors")
        torch.set_rng_state(generators["cpu"])
        if torch.cuda.is_available() and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])

    together(load, f"loading {folder}")
    return manifest


def supersede(run_dir: Path, step: int) -> None:
    """Set aside every checkpoint of a later step than the one a run goes on from, as step-N.superseded."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if NAME.fullmatch(folder.name) and int(folder.name[5:]) > step:
            aside = folder.with_suffix(".superseded")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def gather(engine: Any) -> dict[str, Tensor]:
    """The trained weights on rank 0's CPU, one parameter at a time under ZeRO-3; empty on the other ranks."""
    from deepspeed.runtime.zero import GatheredParameters

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if not dist.is_initialized() or dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder; raises ValueError if there is none that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert isinstance(manifest["files"], dict) and isinstance(manifest["state"], dict)
        return manifest
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{folder} is no complete checkpoint: manifest.json is missing or damaged") from error


def verify(folder: Path) -> dict:
    """The manifest of a checkpoint, every file checked against it; raises ValueError naming the first bad one."""
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if path.stat().st_size != entry["size"] or _digest(path) != entry:
            raise ValueError(f"{folder} is damaged: {name} is not the file that was saved")
    return manifest


def find(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, or None; says on stderr which ones it passed over and why."""
    for folder in _complete(run_dir):
        try:
            verify(folder)
            return folder
        except ValueError as error:
            print(f"passing over a checkpoint: {error}", file=sys.stderr)
    return None


def _complete(run_dir: Path) -> list[Path]:
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if NAME.fullmatch(f.name) and (f / "manifest.json").is_file()), reverse=True)


def _prune(run_dir: Path, keep: int) -> None:
    assert keep >= 2
    for folder in _complete(run_dir)[keep:]:
        (folder / "manifest.json").unlink()  # invisible first: what is left of an interrupted removal is no checkpoint
        shutil.rmtree(folder)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if not (folder / "manifest.json").is_file():
            shutil.rmtree(folder)


def _digest(path: Path, flush: bool = False) -> dict:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return {"size": size, "xxh3_128": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
