"""What a preflight and the ranks' coming together say, with the rank and the host that are not like the others."""

import multiprocessing
import os
import socket
import time
from dataclasses import replace

import pytest

from prosparse import meeting
from prosparse.cli import compose
from prosparse.config import Preflight
from prosparse.meeting import meet, named, odd_ones
from prosparse.preflight import Report, _compared, code, flat, judged, line

VERSIONS = {"Python": "3.11", "torch": "2.13.0", "deepspeed": "0.19.8"}
USUAL = Report("node-0", VERSIONS, "NVIDIA H100", "550.54.15", True, 1000.0, 0.003, int(84e9), int(85e9))


def reports(ranks: int = 512, each: int = 8, **odd: Report) -> list[Report]:
    """Eight ranks a host; `rank9=...` stands in the place of rank 9."""
    usual = [replace(USUAL, host=f"node-{rank // each}") for rank in range(ranks)]
    return [odd.get(f"rank{rank}", report) for rank, report in enumerate(usual)]


def changed(rank: int, **changes) -> dict[str, Report]:
    return {f"rank{rank}": replace(USUAL, host=f"node-{rank // 8}", **changes)}


def test_512_like_ranks_pass():
    assert judged(reports()) == ([], [])
    assert line(reports(), 1.23) == (
        "preflight 512 ranks on 64 hosts in 1.2 s: same code, config and versions; clocks within 3 ms; all-reduce "
        "right; 84.0 of 85.0 GB free on the fullest GPU"
    )


def test_other_versions_are_refused_with_their_ranks():
    old = VERSIONS | {"torch": "2.12.0"}
    odd = changed(9, versions=old) | changed(10, versions=old) | changed(300, versions=VERSIONS | {"Python": "3.12"})
    (one, two), told = judged(reports(**odd))
    assert one.startswith("ranks 9-10 on host node-1: torch is 2.12.0, elsewhere 2.13.0: ") and told == []
    assert two.startswith("rank 300 on host node-37: Python is 3.12, elsewhere 3.11: ")
    assert judged(reports(**odd), Preflight.warn) == ([], [one, two])


def test_a_gpu_that_is_in_use_is_refused_with_its_rank():
    (refused,), told = judged(reports(**changed(17, free_bytes=int(12.3e9))))
    assert refused.startswith("rank 17 on host node-2: only 12.3 of 85.0 GB of its GPU are free: ") and told == []


def test_a_wrong_sum_is_refused_whatever_is_asked():
    (refused,), _ = judged(reports(**changed(511, sum_right=False)), Preflight.warn)
    assert refused.startswith("rank 511 on host node-63: an all-reduce gave a wrong sum")


def test_clocks_gpus_and_drivers_are_only_told():
    late = {f"rank{rank}": replace(USUAL, host="node-1", clock=963.0) for rank in range(8, 16)}
    refused, told = judged(reports(**late, **changed(16, device="NVIDIA A100", driver="535.1")))
    assert refused == [] and len(told) == 3
    assert told[0].startswith("the clock of host node-1 is 37 s behind that of host node-")
    assert told[1].startswith("rank 16 on host node-2: GPU is NVIDIA A100, elsewhere NVIDIA H100: ")
    assert told[2].startswith("rank 16 on host node-2: driver is 535.1, elsewhere 550.54.15: ")
    first = {f"rank{rank}": replace(USUAL, clock=900.0) for rank in range(8)}
    (only,) = judged(reports(**first))[1]
    assert only.startswith("the clock of host node-0 is 100 s behind that of host node-")
    assert "clocks" not in line(reports(**first), 1.0)
    slow = [replace(report, spread_seconds=40.0) for report in reports(**late)]  # a clock read too roughly to judge
    assert judged(slow) == ([], [])


def test_the_majority_is_right_and_of_two_equal_sides_that_of_rank_zero():
    assert odd_ones(["b", "a", "a"]) == ("a", [0]) and odd_ones(["b", "a"]) == ("b", [1])
    assert odd_ones([None]) == (None, [])
    assert named([3]) == "rank 3" and named([8, 9, 10, 17]) == "ranks 8-10, 17"
    assert named(range(48), reports(48) and [r.host for r in reports(48)]) == (
        "ranks 0-47 on hosts node-0, node-1, node-2, node-3 and 2 more"
    )


def test_a_key_that_differs_is_named_without_secrets(monkeypatch):
    monkeypatch.setenv("CORPUS_TOKEN", "a-secret-of-the-corpus")
    demo = ["experiment=demo", "run_dir=r"]
    usual, other = (
        flat(compose("train", [*demo, f"data.sources.stdlib.path=/x/{path}"]))
        for path in ("text", "a-secret-of-the-corpus")
    )
    monkeypatch.setattr("prosparse.preflight.gathered", lambda mine: [mine, mine, _of(other, mine)])
    (told,) = _compared(["a", "a", "b"], usual, "mend it")
    assert told == "rank 2 on host b: data.sources.stdlib.path is /x/***, elsewhere /x/text: mend it"
    keys = list(usual)
    swapped = {key: usual[key] for key in [keys[1], keys[0], *keys[2:]]}
    monkeypatch.setattr("prosparse.preflight.gathered", lambda mine: [mine, _of(swapped, mine)])
    assert "its keys are in another order" in _compared(["a", "b"], usual, "mend it")[0]


def _of(other: dict, mine):
    """What a rank with the values `other` hands over where this one hands over `mine`."""
    from prosparse.preflight import _digest

    return _digest(list(other.items())) if isinstance(mine, str) else other


def test_the_code_is_every_file_that_can_change_a_run():
    names = set(code())
    assert {"prosparse/run.py", "prosparse/kernels/decode.cpp", "configs/recipe/prosparse_7b.yaml"} <= names
    assert not any("__pycache__" in name for name in names)


# --- coming together --------------------------------------------------------------------------------------------------


def _come(environment: dict[str, str], backend: str, seconds: float, host: str, answer) -> None:
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo"} | environment)
    socket.gethostname = lambda: host  # type: ignore[assignment]
    meeting.NOTICE_SECONDS = 1.0
    try:
        store, rank, world = meet(backend, seconds)
        store.add("done", 1)
        while rank == 0 and store.add("done", 0) < world:  # the store ends with it
            time.sleep(0.01)
        answer.put(None)
    except ValueError as error:
        answer.put((environment["RANK"], str(error)))
    finally:
        answer.close()
        answer.join_thread()
        os._exit(0)


def come(*ranks: tuple[int, str], world: int, address="127.0.0.1", port: int | None = None, seconds=2.0) -> list:
    """Fork the ranks, each with its backend, on hosts h0, h1, ...; returns the errors of those that have one."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = []
    for number, (rank, backend) in enumerate(ranks):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        processes.append(context.Process(target=_come, args=(environment, backend, seconds, f"h{number}", answers)))
        processes[-1].start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=10)
    return sorted(answer for answer in told if answer is not None)


def test_ranks_that_come_together_pass():
    assert come((0, "gloo"), (1, "gloo"), (2, "gloo"), world=3, seconds=20) == []


def test_ranks_that_do_not_come_are_named_on_all_others():
    errors = come((0, "gloo"), (2, "gloo"), world=5)
    assert [rank for rank, _ in errors] == ["0", "2"] and errors[0][1] == errors[1][1]
    assert errors[0][1].startswith("ranks 1, 3-4 of 5 did not come to 127.0.0.1:")
    assert "in 2 s (timeouts.join_seconds), ranks 0, 2 on hosts h0, h1 did: " in errors[0][1]


def test_a_rank_that_two_processes_have_is_named():
    errors = come((0, "gloo"), (1, "gloo"), (1, "gloo"), world=3, seconds=20)
    assert len(errors) == 3
    assert all("two processes are rank 1, on host h" in text and "--node-rank" in text for _, text in errors)


def test_a_rank_without_a_gpu_among_ranks_with_one_is_named():
    errors = come((0, "nccl"), (1, "gloo"), (2, "nccl"), world=3, seconds=20)
    assert len(errors) == 3
    assert errors[0][1].startswith("rank 1 on host h1 would use CPUs, the others GPUs: ")


def test_a_host_that_no_other_reaches_is_named(monkeypatch):
    monkeypatch.setattr("prosparse.meeting._loopback", lambda: "127.0.1.1" if socket.gethostname() == "h1" else None)
    errors = come((0, "gloo"), (1, "gloo"), world=2, seconds=20)
    assert len(errors) == 2
    assert errors[0][1].startswith("rank 1 on host h1 would listen on 127.0.1.1, where no other host reaches it: ")
    assert "GLOO_SOCKET_IFNAME" in errors[0][1]


@pytest.mark.parametrize(("address", "why"), [("127.0.0.1", "is MASTER_ADDR the host"), ("no.host.invalid", "resolve")])
def test_a_rank_zero_that_cannot_be_reached_is_told(address, why):
    ((rank, text),) = come((1, "gloo"), world=2, address=address)
    assert rank == "1" and why in text
    assert text.startswith(f"rank 1 on host h0 does not reach rank 0 at {address}:")


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((_, text),) = come((0, "gloo"), world=2, port=port)
    assert text.startswith(f"rank 0 cannot listen on port {port} of host h0") and "MASTER_PORT" in text
