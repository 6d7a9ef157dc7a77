"""The process group of a run: joining it, and agreeing in it so that no rank waits for one that failed.

In: a launcher's environment (DeepSpeed, torchrun, Slurm) or none. Out: rank, rank count, device; functions whose result
or error every rank shares.
"""

import ctypes
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
T = TypeVar("T")


def start_group(choice: str, threads: int | None, seed: int) -> tuple[int, int, torch.device]:
    """Join the launcher's process group, or make one of a single rank; returns (rank, ranks, device).

    `choice`: auto, cpu or cuda; `threads`: of this rank on the CPU, None for its share of the cores. Comes before the
    first import of deepspeed, which looks at DS_ACCELERATOR. ValueError if a GPU was asked for and there is none.
    """
    environment = os.environ
    for name, slurm in (("RANK", "SLURM_PROCID"), ("WORLD_SIZE", "SLURM_NTASKS"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if name not in environment and "MASTER_ADDR" in environment and slurm in environment:
            environment[name] = environment[slurm]
    if "WORLD_SIZE" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wanted = environment.get("DS_ACCELERATOR") if choice == "auto" else choice
    cuda = wanted == "cuda" or (wanted != "cpu" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU here: set device=cpu or install a CUDA build of torch")
    environment["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    bin_folder = str(Path(sys.executable).parent)  # DeepSpeed compiles an op with the ninja that lies beside python
    if bin_folder not in environment["PATH"].split(os.pathsep):
        environment["PATH"] = bin_folder + os.pathsep + environment["PATH"]
    world = int(environment["WORLD_SIZE"])
    local_sizes = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # torchrun, DeepSpeed, Slurm
    here = next((int(environment[name]) for name in local_sizes if name in environment), world)
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here))
    torch.manual_seed(seed)
    if not cuda and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Keep freed tensors in the process: glibc would hand each back to the kernel and fault it in again next time.
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    device = torch.device("cuda", int(environment["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def _shared(error: Exception) -> Exception:
    """Mark an error that every rank raises, so that one of them tells it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def from_rank_zero(function: Callable[[], T]) -> T:
    """Run `function`, which must not communicate, on rank 0; give every rank its result, or its error."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:  # whatever it is has to reach the others, or they wait for ever
            kind = next((known for known in (ValueError, OSError) if isinstance(error, known)), RuntimeError)
            answer[1] = kind(str(error))
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise _shared(answer[1])
    return answer[0]


def agree(function: Callable[[], T]) -> T:
    """Run `function`, which must not communicate, on every rank; if it fails on any, every rank raises.

    ValueError if all failures are, else OSError; the message is that of the first rank that failed, and names it.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:  # as above
        failure = (isinstance(error, ValueError), str(error) if isinstance(error, ValueError) else repr(error))
    failures = [failure]
    if dist.is_initialized():
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
    found = [(rank, *told) for rank, told in enumerate(failures) if told is not None]
    if found:
        rank, _, text = found[0]
        text = text if len(found) == len(failures) else f"rank {rank}: {text}"
        raise _shared(ValueError(text) if all(mendable for _, mendable, _ in found) else OSError(text))
    return result  # type: ignore[return-value]


def together(function: Callable[[], T], what: str) -> T:
    """Run `function`, which communicates, on every rank. A rank where it fails says so and ends: the launcher ends the
    others, which wait for it inside and could not be told."""
    try:
        return function()
    except Exception as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise OSError(f"{what} failed: {error!r}") from error
        print(f"[rank {dist.get_rank()}] {what} failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def same_everywhere(config: Any) -> None:
    """Raise ValueError on every rank unless all of them were started with an equal config."""
    configs = [config]
    if dist.is_initialized():
        configs = [None] * dist.get_world_size()
        dist.all_gather_object(configs, config)
    odd = [rank for rank, other in enumerate(configs) if other != configs[0]]
    if odd:
        told = f"the config of rank {odd[0]} is not that of rank 0: start every rank with the same overrides"
        raise _shared(ValueError(told))
