"""The process group of a run: joining it, and agreeing in it so that no rank waits for one that failed.

In: a launcher's environment (DeepSpeed, torchrun, Slurm) or none. Out: rank, rank count, device; functions whose result
or error every rank shares; one message for a group that ends because of one rank.
"""

import ctypes
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from prosparse.meeting import meet
from prosparse.signals import Stopped, expendable

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NOTICE_SECONDS = 5.0  # in which all ranks that live notice that one does not
FAILED, ALIVE = "prosparse/failed", "prosparse/alive"  # keys in the group's store
T = TypeVar("T")
_claim: socket.socket | None = None
_patience = 0.0  # seconds
_control: Any = None  # a gloo group on the CPU, for what the ranks have to agree on between collectives of the engine


def start_group(
    choice: str, threads: int | None, seed: int, timeout_seconds: float = 7200, join_seconds: float = 600
) -> tuple[int, int, torch.device]:
    """Join the launcher's process group, or make one of a single rank; returns (rank, ranks, device).

    `choice`: auto, cpu or cuda; `threads`: of this rank on the CPU, None for its share of the cores; `join_seconds`:
    how long the ranks wait for each other here. Comes before the first import of deepspeed, which looks at
    DS_ACCELERATOR. ValueError if a GPU was asked for and there is none, and as `meet` does.
    """
    global _control
    environment = os.environ
    if "WORLD_SIZE" not in environment and "SLURM_STEP_NUM_TASKS" in environment:  # a task of srun
        if "MASTER_ADDR" in environment:
            names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
            environment.update({name: environment[slurm] for name, slurm in names.items()})
        elif int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
            raise ValueError("srun started several tasks without MASTER_ADDR: start them as launch/slurm.sbatch does")
    if "WORLD_SIZE" not in environment:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    wanted = environment.get("DS_ACCELERATOR") if choice == "auto" else choice
    cuda = wanted == "cuda" or (wanted != "cpu" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no GPU here: set device=cpu or install a CUDA build of torch")
    if cuda and int(environment["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ValueError(
            f"rank {environment['RANK']} is number {environment['LOCAL_RANK']} of its host and sees "
            f"{torch.cuda.device_count()} GPUs: start a rank a GPU (Slurm: --gpus-per-node, not --gpus-per-task)"
        )
    environment["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    torch.manual_seed(seed)
    device = torch.device("cuda", int(environment["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        with expendable():
            store, rank, world = meet(backend := "nccl" if cuda else "gloo", join_seconds)
            store.set_timeout(timeout)
            own = dist.PrefixStore("group", store)
            try:
                dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)
            except RuntimeError as error:
                raise ValueError(
                    f"rank {rank} on host {socket.gethostname()}: the ranks met and cannot connect to each other "
                    f"({str(error).splitlines()[0]}): set GLOO_SOCKET_IFNAME to the network device between the hosts"
                ) from error
            _control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
    patience(timeout_seconds)
    cores = os.sched_getaffinity(0)
    sharing = [other for host, other in gathered((_host(), cores)) if host == _host() and other & cores]
    torch.set_num_threads(threads or max(1, len(cores) // len(sharing)))
    return dist.get_rank(), dist.get_world_size(), device


def keep_freed_memory() -> None:
    """From now on what is freed on a CPU stays in the process (glibc).

    It would be handed back to the kernel and faulted in again, page by page, in every step. To be called when what
    lives as long as the training has its place, else the holes that loading leaves are too small for what comes.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")  # which containers of one machine share
    return boot.read_text() if boot.exists() else socket.gethostname()


def rank_and_world() -> tuple[int, int]:
    """(rank, ranks) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def patience(seconds: float) -> None:
    """From now on a collective waits so long for the other ranks before the run ends."""
    global _patience
    _patience = seconds
    for group in list(dist.distributed_c10d._world.pg_map):  # DeepSpeed has groups of its own
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Within, collectives wait so long: while ranks load or write."""
    before = _patience
    patience(seconds)
    try:
        yield
    finally:
        patience(before)


def on_any_rank(*flags: bool) -> list[bool]:
    """Each flag, true if it is on any rank (all ranks call it); on the CPU, a GPU's queue is not waited for."""
    if dist.get_world_size() == 1:
        return list(flags)
    told = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=_control)
    return told.bool().tolist()


def summed(values: torch.Tensor) -> torch.Tensor:
    """A CPU tensor summed over the ranks (all ranks call it); a GPU's queue is not waited for."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, group=_control)
    return values


def shared(error: BaseException) -> BaseException:
    """Mark an error that every rank raises, so that one of them tells it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def from_rank_zero(function: Callable[[], T]) -> T:
    """Run `function`, which must not communicate, on rank 0; give every rank its result, or its error."""
    if rank_and_world()[1] == 1:
        return function()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except (Exception, Stopped) as error:  # whatever it is has to reach the others, or they wait for ever
            kind, text = _told(error)
            answer[1] = kind(text)
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise shared(answer[1])
    return answer[0]


def agree(function: Callable[[], T]) -> T:
    """Run `function`, which must not communicate, on every rank; if it fails on any, every rank raises.

    Stopped if a rank was, ValueError if all failures are, else OSError, or RuntimeError with its traceback; the message
    is that of the first rank that failed, and names it.
    """
    result: Any = None
    failure: tuple[type, str] | None = None
    try:
        result = function()
    except (Exception, Stopped) as error:  # as above
        failure = _told(error)
    failures = gathered(failure)
    found = [(rank, *told) for rank, told in enumerate(failures) if told is not None]
    if found:
        kinds = {kind for _, kind, _ in found}
        rank, _, text = found[0]
        text = text if len(found) == len(failures) else f"rank {rank}: {text}"
        raise shared(next(known for known in (Stopped, RuntimeError, OSError, ValueError) if known in kinds)(text))
    return result


def _told(error: BaseException) -> tuple[type, str]:
    """An error as other ranks raise it: its kind and message, or, if nobody expected it, its traceback."""
    kind = next((known for known in (ValueError, OSError, Stopped) if isinstance(error, known)), RuntimeError)
    return kind, str(error) if kind is not RuntimeError else "".join(traceback.format_exception(error)).strip()


def gathered(value: T) -> list[T]:
    """The value of every rank, in their order (all ranks call it)."""
    values: list[Any] = [value]
    if rank_and_world()[1] > 1:
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


# --- the end of a group -----------------------------------------------------------------------------------------------


def last_words(text: str, error: BaseException) -> None:
    """Tell, once for the whole group, why it ends: `text` of the rank where `error` is a failure of its own.

    Where it is that another rank is gone or does not answer, the ranks that live find out which, and one of them says
    so with the place where it waited. Without a group `text` is simply printed.
    """
    rank, world = rank_and_world()
    if world == 1:
        print(text, file=sys.stderr, flush=True)
        return
    others = _of_another_rank(error)
    answer = _in_time(lambda: _ask_store(rank, world, others), 3 * NOTICE_SECONDS)
    told, gone = answer or (False, [0])  # no answer: the store is gone, or hangs, with rank 0
    if told:
        return
    if not others:
        print(f"[rank {rank}] {text}", file=sys.stderr, flush=True)
        if rank == 0:  # the store, in which the others look who failed, lives in this process
            _hang_up()
            time.sleep(2 * NOTICE_SECONDS)
        return
    first = rank == next(other for other in range(world) if other not in gone)
    if first if answer else _first_on_host():
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        names = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}" if gone else "a rank"
        print(
            f"{names} ended without a word or did not answer (killed? out of memory? a lost host? if only slow: "
            f"raise timeouts.steady_seconds or timeouts.start_seconds); rank {rank} waited here:\n{where}"
            f"{type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        if not answer:
            time.sleep(NOTICE_SECONDS)  # keeps the name that `_first_on_host` took


def _hang_up() -> None:
    """Close this process's connections (Linux), but not those of the store: who waits in a collective learns of it.

    gloo's own abort does not reach the other side, and leaving the process would take the store along.
    """
    store = int(os.environ["MASTER_PORT"])
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with suppress(OSError):  # not a connection
            connection = socket.socket(fileno=os.dup(int(descriptor)))
            internet = connection.family in (socket.AF_INET, socket.AF_INET6)
            if internet and store not in (connection.getsockname()[1], connection.getpeername()[1]):
                connection.shutdown(socket.SHUT_RDWR)


def _first_on_host() -> bool:
    """Whether this rank is the first on its host to ask: by a socket's name (Linux), which only one can have."""
    global _claim
    _claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        _claim.bind(f"\0prosparse-{os.getppid()}-{os.environ['MASTER_PORT']}")
        return True
    except OSError:
        return False


def _ask_store(rank: int, world: int, others: bool) -> tuple[bool, list[int]]:
    """(whether a rank has told why the group ends, the ranks that do not turn up)"""
    store = dist.distributed_c10d._get_default_store()
    if not others:
        return store.add(FAILED, 1) > 1, []
    store.set(f"{ALIVE}/{rank}", "")
    time.sleep(NOTICE_SECONDS)
    return store.add(FAILED, 0) > 0, [other for other in range(world) if not store.check([f"{ALIVE}/{other}"])]


def _in_time(function: Callable[[], T], seconds: float) -> T | None:
    """The result of `function`; None if it fails or takes longer: a store whose process hangs answers never."""
    results: list[T] = []

    def run() -> None:
        with suppress(Exception):
            results.append(function())

    try:
        (thread := threading.Thread(target=run, daemon=True)).start()
        thread.join(seconds)
    except RuntimeError:  # no memory for a thread
        run()
    return results[0] if results else None


def _of_another_rank(error: BaseException) -> bool:
    """Whether a collective failed because a peer was gone or late."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection"))
