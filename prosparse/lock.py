"""The folder of a run: every rank sees it and can write there, and one run at a time holds it.

In: a path. Out: the folder and its checkpoints/, made, and rank 0's lock on it.
"""

import fcntl
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prosparse.group import agree, from_rank_zero, rank_and_world

_locks: set[int] = set()  # descriptors; a forked worker that kept one would keep the folder locked
LOCK_SECONDS = 5.0  # a run that has just been stopped may take so long to let go of its folder


def _let_go() -> None:
    for lock in _locks:
        os.close(lock)


os.register_at_fork(after_in_child=_let_go)


def claim(run_dir: Path) -> int | None:
    """Make the run folder and lock it (all ranks call it); returns rank 0's lock, which `release` frees.

    Raises ValueError unless every rank sees the folder and can write in it, and no other run holds it.
    """
    probe, rank = run_dir / ".probe", rank_and_world()[0]

    def write() -> tuple[str, int]:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = _lock(run_dir)
        probe.write_text(token := uuid.uuid4().hex)
        return token, lock

    def look() -> None:
        if not probe.is_file() or probe.read_text() != token:
            here = f"run_dir={run_dir} on host {socket.gethostname()}"
            raise ValueError(f"{here} is not the folder that rank 0 sees: choose one that all hosts share")
        (own := run_dir / "checkpoints" / f".probe-{rank}").touch()
        own.unlink()

    def told(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except OSError as error:
            here = f"run_dir={run_dir} cannot be written on host {socket.gethostname()}"
            raise ValueError(f"{here} ({error.strerror}): choose a folder that can") from error

    token, lock = from_rank_zero(lambda: told(write))
    try:
        agree(lambda: told(look))
    except BaseException:
        release(run_dir, lock if rank == 0 else None)
        raise
    finally:
        if rank == 0:
            probe.unlink()
    return lock if rank == 0 else None


def release(run_dir: Path, lock: int | None) -> None:
    """Let another run have the folder."""
    if lock is not None:
        (run_dir / ".lock").unlink(missing_ok=True)
        _locks.discard(lock)
        os.close(lock)


def _lock(run_dir: Path) -> int:
    path, give_up = run_dir / ".lock", time.monotonic() + LOCK_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break  # else its last holder has removed it meanwhile
        except BlockingIOError:
            if time.monotonic() > give_up:
                holder = os.read(descriptor, 200).decode(errors="replace") or "another run"
                os.close(descriptor)
                raise ValueError(
                    f"run_dir={run_dir} is in use by {holder}: stop that one (touch {run_dir}/STOP) or choose another"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            print(f"{run_dir} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
            break
        os.close(descriptor)
    _locks.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return descriptor
