"""How the ranks that a launcher started come together: one that is missing, came twice or is of another kind is named.

In: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Out: the store that a process group starts from.
"""

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import groupby
from typing import TypeVar

import torch.distributed as dist

NOTICE_SECONDS = 30.0  # after which who waits says for whom
T = TypeVar("T")


class Apart(ValueError):
    """The ranks did not come together; every rank that came raises it."""

    shared = True  # one of them tells it


def odd_ones(values: Sequence[T]) -> tuple[T, list[int]]:
    """(what most ranks have, the ranks that have something else); where as many have one as the other rank 0 is right.

    Values are compared as JSON.
    """
    texts = [json.dumps(value) for value in values]
    counts = Counter(texts)
    usual = max(counts, key=lambda text: (counts[text], text == texts[0]))
    return values[texts.index(usual)], [rank for rank, text in enumerate(texts) if text != usual]


def named(ranks: Sequence[int], hosts: Sequence[str] | dict[int, str] | None = None) -> str:
    """Ascending ranks in words, e.g. `ranks 8-15, 17 on host node-1`; `hosts`: of every rank, where they are known."""
    runs = []
    for _, group in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in group]
        runs.append(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}")
    text = f"rank{'s' * (len(ranks) > 1)} {', '.join(runs)}"
    if hosts is None:
        return text
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(names) - 4} more" * (len(names) > 4)
    return f"{text} on host{'s' * (len(names) > 1)} {', '.join(names[:4])}{more}"


def meet(backend: str, seconds: float) -> tuple[dist.Store, int, int]:
    """Wait until every rank is there, at most so long; returns (store, rank, ranks).

    ValueError that names what is wrong: an address where no rank 0 answers, a port that is taken, ranks that did not
    come, a rank that two processes have, ranks without a GPU among ranks with one, a host that others cannot reach.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until, here = time.monotonic() + seconds, socket.gethostname()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    store = dist.PrefixStore(f"attempt-{attempt}", _connected(rank, world, address, port, until, seconds))
    if store.add(f"meeting/came/{rank}", 1) > 1:
        other = json.loads(store.get(f"meeting/{rank}"))[0]
        store.set(
            "meeting/twice",
            f"two processes are rank {rank}, on host {other} and on host {here}: give each host its own --node-rank "
            "(deepspeed: --node_rank), and start each once",
        )
    else:
        store.set(f"meeting/{rank}", json.dumps([here, backend, _loopback()]))
        if rank == 0:
            fault = _fault(store, world, f"{address}:{port}", until, seconds)
            store.set("meeting/fault", fault)
            if fault:
                _let_hear(store, world)
    try:
        store.wait(["meeting/fault"], timedelta(seconds=seconds + NOTICE_SECONDS))
        fault = store.get("meeting/fault").decode()
    except dist.DistError as error:
        raise ValueError(
            f"rank {rank} on host {here} met rank 0 at {address}:{port}, which then went away: its log says why"
        ) from error
    if fault:
        store.add("meeting/heard", 1)
        raise Apart(fault)
    return store, rank, world


def _connected(rank: int, world: int, address: str, port: int, until: float, seconds: float) -> dist.Store:
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's agent has it
    if not serves:  # by a plain socket: torch would print traces of C++ while nobody answers
        _reach(rank, address, port, until, seconds)
    wait = timedelta(seconds=max(NOTICE_SECONDS, until - time.monotonic()))
    try:
        return dist.TCPStore(address, port, world, serves, wait, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        if not serves:
            raise
        raise ValueError(
            f"rank 0 cannot listen on port {port} of host {socket.gethostname()}, another program may have it "
            f"({str(error).splitlines()[0]}): give another port (--master_port, --master-port, MASTER_PORT)"
        ) from error


def _reach(rank: int, address: str, port: int, until: float, seconds: float) -> None:
    """Wait until rank 0 listens; ValueError with the reason if it does not."""
    told = f"rank {rank} on host {socket.gethostname()} does not reach rank 0 at {address}:{port}"
    notice = time.monotonic() + NOTICE_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, min(NOTICE_SECONDS, seconds))).close()
            return
        except OSError as error:
            why = (
                f"the name {address} does not resolve here: give an address of rank 0's host that does"
                if isinstance(error, socket.gaierror)
                else f"{error}: is MASTER_ADDR the host of rank 0, was rank 0 started, does a firewall close the port"
            )
            if (now := time.monotonic()) > until:
                raise ValueError(f"{told} in {seconds:.0f} s (timeouts.join_seconds): {why}") from error
            if now > notice and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{told} yet: {why}", file=sys.stderr, flush=True)
                notice = now + NOTICE_SECONDS
        time.sleep(0.2)


def _fault(store: dist.Store, world: int, place: str, until: float, seconds: float) -> str:
    """Rank 0: what is wrong with those who came, in words; empty if all of them did and nothing is."""
    notice = time.monotonic() + NOTICE_SECONDS
    keys = [f"meeting/{rank}" for rank in range(world)]
    while not store.check(keys):
        if store.check(["meeting/twice"]):
            return store.get("meeting/twice").decode()
        if (now := time.monotonic()) > min(notice, until):
            there = {rank: json.loads(store.get(key))[0] for rank, key in enumerate(keys) if store.check([key])}
            missing = named([rank for rank in range(world) if rank not in there])
            told = f"{missing} of {world} did not come to {place}"
            came = f"{named(list(there), there)} did"
            if now > until:
                why = "were they started, with this address and port, and is their log empty or does it end in an error"
                return f"{told} in {seconds:.0f} s (timeouts.join_seconds), {came}: {why}"
            print(f"{told} yet, {came}", file=sys.stderr, flush=True)
            notice = now + NOTICE_SECONDS
        time.sleep(0.05)
    if store.check(["meeting/twice"]):
        return store.get("meeting/twice").decode()
    hosts, backends, loops = zip(*(json.loads(store.get(key)) for key in keys), strict=True)
    usual, odd = odd_ones(backends)
    if odd:
        has = {"nccl": "GPUs", "gloo": "CPUs"}
        ours, theirs = has.get(backends[odd[0]], backends[odd[0]]), has.get(usual, usual)
        return (
            f"{named(odd, hosts)} would use {ours}, the others {theirs}: look at nvidia-smi and torch there, or give "
            "device=cuda or device=cpu everywhere"
        )
    alone = [rank for rank, loop in enumerate(loops) if loop is not None]
    if alone and len(set(hosts)) > 1:
        return (
            f"{named(alone, hosts)} would listen on {loops[alone[0]]}, where no other host reaches it: set "
            "GLOO_SOCKET_IFNAME to the network device between the hosts (`ip -br address` shows them), or give the "
            "host's own name its address in /etc/hosts"
        )
    return ""


def _loopback() -> str | None:
    """The address of this host on which gloo would listen, if only this host itself reaches it."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)]
    except OSError:
        found = ["127.0.0.1"]  # what gloo falls back to
    return found[0] if all(address == "::1" or address.startswith("127.") for address in found) else None


def _let_hear(store: dist.Store, world: int) -> None:
    """The store ends with this process: the others have to read it first."""
    came = sum(store.check([f"meeting/{rank}"]) for rank in range(1, world))
    give_up = time.monotonic() + 5
    with suppress(dist.DistError):
        while store.add("meeting/heard", 0) < came and time.monotonic() < give_up:
            time.sleep(0.05)
