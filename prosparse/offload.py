"""What a run that offloads needs of its machine: DeepSpeed's compiled operators, and a folder for swap files.

In: a `Train` config. Out: operators that load, a folder of this rank's own, or a ValueError that names the remedy.
"""

import mmap
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import xxhash

from prosparse import schedule
from prosparse.config import Offload, Recipe, Train
from prosparse.group import agree, gathered, rank_and_world

SUB_GROUP = 100_000_000  # elements that are swapped at a time; DeepSpeed's 1e9 take four pinned buffers of 4 GB a rank
STATE_BYTES = 12  # a parameter: master and two moments
SECTOR = 4096  # bytes: the largest that a disk has


def build_operators(config: Train) -> None:
    """Compile what steps in host memory, and what swaps, once a host and torch version (all ranks call it).

    ValueError where one cannot be compiled. torch's lock file, at which one rank of a host waits for another, outlives
    a process that is killed while it compiles.
    """
    if config.zero.offload is Offload.none:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    agree(lambda: _build(config, CPUAdamBuilder(), "CPU Adam", "g++ and ninja"))
    if config.zero.offload is Offload.nvme:
        agree(lambda: _build(config, AsyncIOBuilder(), "async_io", "libaio-dev (libaio-devel), g++ and ninja"))


def _build(config: Train, builder: Any, what: str, packages: str) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(builder.name, verbose=False))
    if not any(folder.glob("*.so")):
        text = f"compiling DeepSpeed's {what} (minutes, once); if it does not end: remove {folder}/lock"
        print(text, file=sys.stderr, flush=True)
    try:
        builder.load(verbose=False)
    except Exception as error:  # of the compiler, of ninja, of DeepSpeed's look at the machine
        why = next(iter(str(error).splitlines()), type(error).__name__)
        other = "none" if config.zero.offload is Offload.cpu else "cpu"
        raise ValueError(
            f"zero.offload={config.zero.offload}: DeepSpeed's {what} cannot be compiled here ({why}): install "
            f"{packages}, or set zero.offload={other}"
        ) from error


def swap_folder(config: Train) -> Path | None:
    """This rank's own in zero.offload_path, the same whenever the run is started again; None without swapping."""
    if config.zero.offload is not Offload.nvme:
        return None
    assert config.zero.offload_path is not None
    run = Path(config.run_dir).expanduser().absolute()
    name = f"prosparse-{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
    return Path(config.zero.offload_path).expanduser() / f"{name}-rank-{rank_and_world()[0]:05d}"


def open_swap(config: Train) -> None:
    """Make this rank's folder for swap files, empty (all ranks call it); nothing without swapping.

    Those that an earlier start of the run left on this host, which was killed, are removed. ValueError if the folder
    cannot be written past the system's cache, as DeepSpeed does.
    """
    folder = swap_folder(config)
    if folder is None:
        return

    def clear() -> None:
        for left in folder.parent.glob(f"{folder.name[:-5]}?????"):
            shutil.rmtree(left, ignore_errors=True)  # other ranks of this host remove them too

    def probe() -> None:
        try:
            folder.mkdir(parents=True)
            block = mmap.mmap(-1, SECTOR)  # O_DIRECT wants memory that begins at a page
            descriptor = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                os.write(descriptor, block)
            finally:
                os.close(descriptor)
                (folder / "probe").unlink()
        except OSError as error:
            raise ValueError(
                f"zero.offload_path={config.zero.offload_path} does not take direct writes ({error.strerror}): give a "
                "folder on a disk of this host (a tmpfs may not do)"
            ) from error

    agree(clear)
    agree(probe)


def swap_bytes(recipe: Recipe, parameters: int) -> int:
    """What the swap files of all ranks take, with the copies that a steered stage's sweep keeps."""
    sweeps = any(schedule.steered(recipe, span.first) for span in schedule.spans(recipe))
    return STATE_BYTES * (1 + sweeps) * parameters


def check_swap(config: Train, parameters: int) -> None:
    """ValueError unless the swap files of this host's ranks fit on the disk (all ranks call it)."""
    folder = swap_folder(config)
    if folder is None:
        return
    here, hosts = socket.gethostname(), gathered(socket.gethostname())
    needed = 1.05 * swap_bytes(config.recipe, parameters) * hosts.count(here) / len(hosts)

    def check() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"zero.offload_path={config.zero.offload_path} has {free / 1e9:.1f} GB free on host {here}, and "
                f"{needed / 1e9:.1f} GB of swap files belong there: make room, or start more hosts"
            )

    agree(check)


def remove_swap(config: Train) -> None:
    """Remove this rank's swap files, if it has any."""
    folder = swap_folder(config)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def align_swap() -> None:
    """Let DeepSpeed, before an engine starts, swap whole sectors of every disk.

    It takes 1024 bytes for a multiple of a sector. Where one has 4096, the end of nearly every transfer would fail.
    """
    from deepspeed.runtime.swap_tensor import optimizer_utils

    optimizer_utils.AIO_ALIGNED_BYTES = SECTOR


def keep_gradients(engine: Any) -> None:
    """Let no gradient be swapped, where anything is: they are whole in host memory anyway.

    DeepSpeed reads each into its place among those of a sub-group. A direct read fails where that place does not begin
    at a sector, as after a matrix of odd size, and since nobody looks, the step would take what lay there before.
    """
    optimizer, begin = engine.optimizer, 0
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None:
        return
    gradients = {}
    for flat, numel in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat_numel, strict=True
    ):
        gradients[flat.ds_id] = optimizer.grad_partitions_flat_buffer.narrow(0, begin, numel)
        begin += numel

    def swap_out(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Any]) -> None:
        swapper.swap_params_info[parameter.ds_id].unswapped_gradients = {0: gradients[parameter.ds_id]}

    swapper.swap_out_gradients = swap_out
