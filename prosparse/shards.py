"""A training's tensors as files: the part of every parameter that a rank holds, in safetensors, hashed while written.

In: a DeepSpeed engine under ZeRO-1, 2 or 3. Out: one file a rank with fp32 master weights and Adam's moments; the way
back into an engine with any number of ranks and any ZeRO stage; whole weights without an engine.

Rank counts and ZeRO stages cut parameters differently. A file says where in the flattened parameter each of its pieces
starts, and a reader takes the slices that it needs, so nothing has to be converted and no pickle is opened.
"""

import json
import os
import struct
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from torch import Tensor

STATES = ("master", "exp_avg", "exp_avg_sq")
CHUNK = 1 << 26  # bytes that are written while they are hashed
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}  # what a file holds, by safetensors' names


@dataclass
class Piece:
    """Elements start to start + numel of the flattened parameter `name`, as this rank holds them."""

    name: str
    start: int
    numel: int
    states: dict[str, Tensor]  # by STATES, fp32 [numel]: views of the engine's own


# --- what an engine holds ---------------------------------------------------------------------------------------------


@dataclass
class _Place:
    """A piece without its states: it begins at `offset` of the flat tensors of a group (a sub-group under ZeRO-3)."""

    name: str
    start: int
    numel: int
    group: int
    offset: int


def outline(engine: Any) -> list[Piece]:
    """This rank's `pieces`, in their order, as shapes only: their tensors are on the device meta."""
    places = _places(engine)
    return [Piece(p.name, p.start, p.numel, {s: torch.empty(p.numel, device="meta") for s in STATES}) for p in places]


def pieces(engine: Any, change: bool = False) -> Generator[Piece, None, None]:
    """This rank's pieces of every parameter; moments are made (zero) where the engine has not stepped yet.

    What DeepSpeed keeps in swap files is read a sub-group at a time, so a piece's tensors last until the next piece is
    asked for, and changes are written back only with `change`.
    """
    for group, places in groupby(_places(engine), key=lambda place: place.group):
        with _in_memory(engine.optimizer, group, change) as (flat, moments):
            whole = {"master": flat.data, **moments}
            for place in places:
                states = {state: whole[state].narrow(0, place.offset, place.numel) for state in STATES}
                yield Piece(place.name, place.start, place.numel, states)


def _places(engine: Any) -> list[_Place]:
    """Sorted by group.

    Reads DeepSpeed's bookkeeping: `_hp_mapping` under ZeRO-1 and 2, `grad_position` and `ds_tensor` under ZeRO-3.
    """
    optimizer, found = engine.optimizer, []
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
            numel = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the last parts are padded
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # other ranks hold all of it
                continue
            group = mapping.param_group_index
            offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
            numel = mapping.hp_fragment_address.numel
        if numel > 0:
            found.append(_Place(name, start, numel, group, offset))
    return sorted(found, key=lambda place: place.group)


@contextmanager
def _in_memory(optimizer: Any, group: int, change: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The flat master weights and moments of a group; from the swap files meanwhile, if that is where they are."""
    inner, sharded = optimizer.optimizer, hasattr(optimizer, "fp32_partitioned_groups_flat")
    flat = optimizer.fp32_partitioned_groups_flat[group] if sharded else inner.param_groups[group]["params"][0]
    if not (sharded and optimizer._swappable_optimizer_subgroup(group)):
        yield flat, _moments(inner, flat)
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    new = "exp_avg" not in inner.state[flat]  # its moments have no file yet
    try:
        yield flat, _moments(inner, flat)
    finally:
        if change or new:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            optimizer._release_swap_buffers(group)


def shapes(engine: Any) -> dict[str, list[int]]:
    """The shape of every parameter by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def adam_steps(engine: Any) -> float:
    """The step count of Adam's bias correction, which all parameters share."""
    return max((float(state["step"]) for state in engine.optimizer.optimizer.state.values()), default=0.0)


def set_adam_steps(engine: Any, steps: float) -> None:
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else round(steps)


def forget_moments(engine: Any) -> None:
    """Zero Adam's moments and step count: the next step is that of a new optimizer."""
    for piece in pieces(engine, change=True):
        piece.states["exp_avg"].zero_()
        piece.states["exp_avg_sq"].zero_()
    set_adam_steps(engine, 0.0)


def copies(piece: Piece, folder: Path | None = None) -> dict[str, Tensor]:
    """A piece's states in host memory, or in files of `folder` that are mapped and go with the last reference."""
    return {state: _room(tensor.numel(), folder).copy_(tensor.detach()) for state, tensor in piece.states.items()}


def _room(numel: int, folder: Path | None) -> Tensor:
    if folder is None:
        return torch.empty(numel, dtype=torch.float32)
    with NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, 4 * numel)  # a mapped file that finds its disk full kills the process
        return torch.from_file(file.name, shared=True, size=numel, dtype=torch.float32)


def put_back(piece: Piece, states: dict[str, Tensor]) -> None:
    """Fill a piece, one of those asked for with `change`, with its `copies`; `refresh` has to follow."""
    for state, tensor in piece.states.items():
        tensor.copy_(states[state])


def refresh(engine: Any) -> None:
    """Copy the master weights into the module's own, as DeepSpeed does after a step (all ranks call it)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # small ones are whole after a step; gathered again they would stay so
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            with _in_memory(optimizer, group):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()


def _moments(inner: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    state = inner.state[flat]
    if "exp_avg" not in state:  # as torch.optim.AdamW(fused=True), or DeepSpeed's on the CPU, makes them at first
        fused = isinstance(inner, torch.optim.AdamW)
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device) if fused else 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
    return {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


# --- files ------------------------------------------------------------------------------------------------------------


def tensors_of(parts: Iterable[Piece]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a rank's file holds: tensors by "state/parameter", and its metadata, the start of each piece."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for piece in parts:
        tensors |= {f"{state}/{piece.name}": piece.states[state] for state in STATES}
        starts[piece.name] = piece.start
    return tensors, {"starts": json.dumps(starts)}


def filled(outlined: Mapping[str, Tensor], parts: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, where those on the device meta come from the pieces, in their order."""
    states = (piece.states[state] for piece in parts for state in STATES)
    for name, tensor in outlined.items():
        yield name, next(states) if tensor.is_meta else tensor


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], parts: Iterable[Piece] = ()) -> dict:
    """Write a safetensors file; returns {"size", "xxh3_128"}, of the bytes as they were handed to the disk.

    Tensors on the device meta are `filled` from `parts`, one at a time.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        for chunk in _chunks(struct.pack("<Q", len(raw)) + raw, filled(tensors, parts)):
            hashed = hasher.submit(digest.update, chunk)
            file.write(chunk)
            hashed.result()
            size += len(chunk)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def _chunks(header: bytes, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    yield header
    for _, tensor in tensors:
        for part in tensor.detach().flatten().view(torch.uint8).split(CHUNK):
            yield part.cpu().numpy().data


def digest(path: Path) -> dict:
    """{"size", "xxh3_128"} of a file as it is on disk."""
    hashed, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hashed.update(buffer[:count])
            size += count
    return {"size": size, "xxh3_128": hashed.hexdigest()}


def sync(path: Path) -> None:
    """Return when a file, or the entries of a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_into(files: list[Path], parts: Iterable[Piece]) -> None:
    """Fill the pieces from the files of any number of ranks. ValueError if the files lack a part of one."""
    with ExitStack() as stack:
        found = _index(stack, files)
        for piece in parts:
            for state, target in piece.states.items():
                filled = 0
                for start, numel, file in found.get(piece.name, []):
                    low, high = max(piece.start, start), min(piece.start + piece.numel, start + numel)
                    if low < high:
                        source = file.get_slice(f"{state}/{piece.name}")[low - start : high - start]
                        target[low - piece.start : high - piece.start].copy_(source)
                        filled += high - low
                if filled != piece.numel:
                    raise ValueError(f"{state} of {piece.name}: {filled} of {piece.numel} elements are in the files")


def read_weights(files: list[Path], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Every parameter whole, fp32, from the master weights in the files. ValueError if a part of one is not there."""
    weights = {name: torch.empty(shape) for name, shape in shapes.items()}
    read_into(files, [Piece(name, 0, w.numel(), {"master": w.view(-1)}) for name, w in weights.items()])
    return weights


def _index(stack: ExitStack, files: list[Path]) -> dict[str, list[tuple[int, int, Any]]]:
    found: dict[str, list[tuple[int, int, Any]]] = {}
    for path in files:
        file = stack.enter_context(safe_open(path, "pt"))
        for name, start in json.loads(file.metadata()["starts"]).items():
            found.setdefault(name, []).append((start, file.get_slice(f"master/{name}").get_shape()[0], file))
    return found
