"""The check that every rank runs before a run writes anything: what is not as elsewhere is named, with its rank.

In: a config, a process group. Out: what was found, and a line for people; or one error that every rank raises.
"""

import json
import platform
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from prosparse.config import Preflight, Train
from prosparse.group import from_rank_zero, gathered, rank_and_world, shared, summed
from prosparse.meeting import named, odd_ones
from prosparse.telemetry import PACKAGES, redact

ELEMENTS = 2**18  # of the sum that is checked
CLOCK_SECONDS = 5.0  # by which clocks may differ before it is told
FREE = 0.8  # of a GPU's memory, while nothing of this run is on it
GB = 1e9
Difference = dict[str, tuple[str, str]]  # by name: a digest, and what people are shown


@dataclass
class Report:
    """What one rank says of itself."""

    host: str
    versions: dict[str, str]
    device: str
    driver: str | None
    sum_right: bool
    clock: float  # seconds since 1970, which all ranks read within `spread_seconds` by rank 0's own watch
    spread_seconds: float
    free_bytes: int | None  # of the GPU's memory
    total_bytes: int | None


def preflight(config: Train, device: torch.device) -> dict[str, Any]:
    """Compare the ranks (all of them call it); nothing is written but empty files, which go again.

    Refused with a ValueError that names ranks, hosts and the difference: another config, other code of this package,
    other versions, a wrong sum of an all-reduce, a GPU that others use, hosts that do not share run_dir or data.cache.
    Only told: clocks that differ (no file and no lock here depends on one), GPUs of several kinds, drivers that differ.
    With config.preflight=warn versions and GPUs in use are only told too.
    """
    rank, world = rank_and_world()
    began, host = time.perf_counter(), socket.gethostname()
    hosts = gathered(host)
    # By itself and first: what other code would say next nobody can foresee.
    refuse(_compared(hosts, code(), "use one environment, on a file system that all hosts share"))
    refuse(_compared(hosts, flat(config), "start every rank with the same overrides"))
    clock, spread = _clock()
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
    mine = Report(
        host=host,
        versions=versions(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        driver=_driver() if device.type == "cuda" else None,
        sum_right=_sum_is_right(device),
        clock=clock,
        spread_seconds=spread,
        free_bytes=free,
        total_bytes=total,
    )
    reports = gathered(mine)
    refused, told = judged(reports, config.preflight)
    refuse(refused)
    if world > 1:
        refuse([*_apart(hosts, "run_dir", config.run_dir), *_apart(hosts, "data.cache", config.data.cache)])
    seconds = time.perf_counter() - began
    if rank == 0:
        for text in told:
            print(f"preflight warning: {text}", file=sys.stderr, flush=True)
        if world > 1 or config.preflight is Preflight.only:
            print(line(reports, seconds), file=sys.stderr, flush=True)
    frees = [report.free_bytes for report in reports if report.free_bytes is not None]
    found = {"ranks": world, "hosts": len(set(hosts)), "seconds": seconds, "clock_seconds": clock_bound(reports)}
    return found | {"free_bytes": min(frees, default=None), "warnings": told}


def refuse(faults: Sequence[str]) -> None:
    """Raise one ValueError on every rank if there are any faults, in words."""
    if faults:
        more = f"; and {len(faults) - 4} more differences" * (len(faults) > 4)
        raise shared(ValueError(f"preflight: {'; '.join(faults[:4])}{more}"))


def judged(reports: Sequence[Report], how: Preflight = Preflight.run) -> tuple[list[str], list[str]]:
    """(what is refused, what is only told) of what all ranks report, in words."""
    hosts = [report.host for report in reports]
    tolerable = _unlike(hosts, [report.versions for report in reports], "use one environment for all hosts")
    for rank, report in enumerate(reports):
        if report.free_bytes is not None and report.total_bytes and report.free_bytes < FREE * report.total_bytes:
            tolerable.append(
                f"{named([rank], hosts)}: only {report.free_bytes / GB:.1f} of {report.total_bytes / GB:.1f} GB of "
                "its GPU are free: end what else is on it (nvidia-smi names it)"
            )
    wrong = [rank for rank, report in enumerate(reports) if not report.sum_right]
    refused = [
        f"{named(wrong, hosts)}: an all-reduce gave a wrong sum: test the links between these hosts (nccl-tests)"
    ] * bool(wrong)
    told = []
    clocks = {host: reports[hosts.index(host)].clock for host in hosts}
    usual = sorted(clocks, key=lambda host: clocks[host])[(len(clocks) - 1) // 2]  # most are about as late as it
    for host in clocks:
        offset = clocks[host] - clocks[usual]
        if abs(offset) - reports[0].spread_seconds > CLOCK_SECONDS:
            told.append(
                f"the clock of host {host} is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} that of "
                f"host {usual}: set it (chrony), or times in logs and certificates will not fit"
            )
    told += _unlike(hosts, [{"GPU": report.device} for report in reports], "the slowest sets the pace")
    told += _unlike(hosts, [{"driver": report.driver or "none"} for report in reports], "better to have one")
    return (refused, told + tolerable) if how is Preflight.warn else (refused + tolerable, told)


def line(reports: Sequence[Report], seconds: float) -> str:
    """What was found right, for people."""
    hosts = {report.host for report in reports}
    free = min((report for report in reports if report.free_bytes is not None), key=_free, default=None)
    same = "code, config and versions" if len({str(report.versions) for report in reports}) == 1 else "code and config"
    memory = "" if free is None else f"; {_free(free) / GB:.1f} of {(free.total_bytes or 0) / GB:.1f} GB free"
    clocks = f"clocks within {1000 * clock_bound(reports):.0f} ms; " * (clock_bound(reports) <= CLOCK_SECONDS)
    return (
        f"preflight {len(reports)} rank{'s' * (len(reports) > 1)} on {len(hosts)} host{'s' * (len(hosts) > 1)} in "
        f"{seconds:.1f} s: same {same}; {clocks}all-reduce right" + memory + " on the fullest GPU" * (free is not None)
    )


def clock_bound(reports: Sequence[Report]) -> float:
    """Seconds by which the clock of any rank differs from rank 0's at most."""
    return max(abs(report.clock - reports[0].clock) for report in reports) + reports[0].spread_seconds


def code() -> Difference:
    """Every file of this package by its name, with its digest."""
    roots = {"prosparse": Path(__file__).parent, "configs": Path(str(files("prosparse.configs")))}
    found = {}
    for name, root in roots.items():
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".cpp", ".yaml"):
                digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
                found[f"{name}/{path.relative_to(root)}"] = (digest, f"of digest {digest[:8]}")
    return found


def flat(config: Train) -> Difference:
    """Every key of a config, e.g. `recipe.lr.peak`, with its value, shown without secrets."""
    found: Difference = {}

    def add(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, part in value.items():
                add(part, f"{path}.{key}" if path else key)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            found[path] = (_digest(text), redact(str(text)))

    add(asdict(config), "")
    return found


def versions() -> dict[str, str]:
    """Versions of what computes the result and of what the ranks talk through."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])} | {name: version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        found |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def _free(report: Report) -> int:
    return report.free_bytes or 0


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value).encode())


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")  # NVRM version: NVIDIA UNIX ... Kernel Module  550.54.15  date
    words = path.read_text().split("\n")[0].split() if path.exists() else []
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), None)


def _clock() -> tuple[float, float]:
    """(this rank's clock, seconds on this rank's watch within which all ranks read theirs)"""
    together = lambda: summed(torch.zeros(1))  # noqa: E731  # none leaves it before all have entered
    together()
    began = time.perf_counter()
    together()
    clock = time.time()
    together()
    return clock, time.perf_counter() - began


def _sum_is_right(device: torch.device) -> bool:
    """Whether an all-reduce by the training's backend gives what it has to, exactly."""
    rank, world = rank_and_world()
    places = torch.arange(ELEMENTS, dtype=torch.float32, device=device) % 7
    values = places + rank
    dist.all_reduce(values)
    return torch.equal(values, world * places + world * (world - 1) / 2)


def _compared(hosts: list[str], mine: Difference, remedy: str) -> list[str]:
    """In what each rank's named values differ, in words (all ranks call it); the values travel only if they do."""
    _, odd = odd_ones(gathered(_digest(list(mine.items()))))
    return _unlike(hosts, gathered(mine), remedy) if odd else []


def _unlike(hosts: Sequence[str], values: Sequence[dict[str, Any]], remedy: str) -> list[str]:
    """The first difference of every odd rank, in words, ranks with the same one together."""
    usual, odd = odd_ones([list(value.items()) for value in values])
    alike: dict[str, list[int]] = {}
    for rank in odd:
        alike.setdefault(_difference(values[rank], dict(usual)), []).append(rank)
    return [f"{named(ranks, hosts)}: {text}: {remedy}" for text, ranks in alike.items()]


def _difference(odd: dict[str, Any], usual: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return "missing" if value is None else value[1] if isinstance(value, tuple) else value

    for key in [*odd, *(key for key in usual if key not in odd)]:
        if odd.get(key) != usual.get(key):
            return f"{key} is {shown(odd.get(key))}, elsewhere {shown(usual.get(key))}"
    return "its keys are in another order"


def _apart(hosts: list[str], key: str, name: str) -> list[str]:
    """The ranks that do not see a folder of rank 0, or where it would be made, in words (all ranks call it).

    None where rank 0 cannot write there: whoever has to will say so.
    """

    def write() -> Path | None:
        folder = Path(name).expanduser().absolute()
        place = next(path for path in (folder, *folder.parents) if path.is_dir())
        try:
            (probe := place / f".probe-{uuid.uuid4().hex}").touch()
            return probe
        except OSError:
            return None

    probe = from_rank_zero(write)
    try:
        seen = gathered(probe is None or probe.exists())
    finally:
        if probe is not None and rank_and_world()[0] == 0:
            probe.unlink()
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    told = f"{key}={name} is not the folder that rank 0 sees: choose one that all hosts share"
    return [f"{named(blind, hosts)}: {told}"] if blind else []
