"""Ranks forked from a process that has torch and DeepSpeed imported: a start costs half a second, not ten.

`Nursery` is what tests and the fault campaign use; run as a script this file is the process that forks.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANG_SECONDS = 120


class Nursery:
    """A process that forks groups of ranks; `with Nursery() as nursery: nursery.start([...])`.

    notice_seconds: in place of `prosparse.group.NOTICE_SECONDS`, which suits hosts that other work slows down.
    """

    def __init__(self, notice_seconds: float | None = None) -> None:
        self.notice_seconds = notice_seconds

    def __enter__(self):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(self.notice_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, question: dict):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, arguments: list[str], ranks: int = 2, log: Path | None = None, verb="train", **inject) -> "Group":
        """Fork `ranks` that run `prosparse VERB ARGUMENTS`; stdout and stderr go to `log`.

        `verb` may be a script (*.py) too; `inject` (see `_inject`) breaks something in one of them.
        """
        log = log or Path("/dev/null")
        offset = log.stat().st_size if log.is_file() else 0
        question = {"start": arguments, "ranks": ranks, "log": str(log), "verb": verb, "inject": inject}
        return Group(self, self.ask(question), log, offset)

    def run(self, arguments: list[str], ranks: int = 2, log: Path | None = None, verb="train", **inject) -> "Group":
        """`start`, and wait for the end."""
        group = self.start(arguments, ranks, log, verb, **inject)
        group.wait()
        return group


@dataclass
class Group:
    nursery: Nursery
    pids: list[int]
    log: Path
    offset: int  # of its first line in the log
    codes: list[int] | None = None  # exit codes, negative for signals
    hung: bool = False

    def signal(self, number: int, rank: int) -> bool:
        """Whether the rank was still there."""
        try:
            os.kill(self.pids[rank], number)
            return True
        except ProcessLookupError:
            return False

    def wait(self, seconds: float = HANG_SECONDS) -> list[int]:
        """The exit codes; whoever is still there after `seconds` is killed, and `hung` says so."""
        answer = self.nursery.ask({"wait": self.pids, "seconds": seconds})
        self.codes, self.hung = answer["codes"], answer["hung"]
        return self.codes

    def ended(self, rank: int) -> bool:
        """Whether a rank is gone, waited for or not."""
        try:
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    def running(self) -> bool:
        return not any(self.ended(rank) for rank in range(len(self.pids)))

    def text(self) -> str:
        """What it has said so far."""
        if not self.log.is_file():
            return ""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.offset)
            return file.read()

    def result(self) -> dict:
        """What a verb printed at its end."""
        return json.loads(next(line for line in reversed(self.text().splitlines()) if line.startswith("{")))

    def wait_for(self, words: str, seconds: float = HANG_SECONDS) -> bool:
        """Whether `words` turned up in what it says."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if words in self.text():
                return True
            time.sleep(0.02)
        return False


# --- the process that forks -------------------------------------------------------------------------------------------


def _inject(rank: int, what: dict) -> None:
    """Break something in this rank before it starts.

    {"die_in_save": n, "save": k, "rank": r, "signal": s}: signal s (default SIGKILL) to itself at the n-th step of a
    save: a chunk that is written, a file or folder that is made, renamed or removed; in the first save from the k-th
    (default 1) on that has so many. {"count_in_save": file}: write how many such steps each save has.
    {"die_in_evaluation": n, "rank": r, "signal": s}: the same at the n-th forward pass of evaluations. {"nan": windows,
    "rank": r}: the loss is not finite in these windows of this process. {"full": bytes, "rank": r}: no larger file.
    {"memory": n}: no more memory in window n. {"fail": n}: an exception in window n.
    {"spike": {window: shift}}: the loss reported for it is higher.
    """
    from prosparse import ending, engine, trainer

    mine = what.get("rank", rank) == rank

    def die(where: str) -> None:
        number = signal.Signals(what.get("signal", signal.SIGKILL))
        os.write(2, f"[injected] rank {rank}: {number.name} {where}\n".encode())
        os.kill(os.getpid(), number)

    if "die_in_save" in what or "count_in_save" in what:
        _watch_saves(rank, what, die if mine else lambda where: None)
    if "die_in_evaluation" in what and mine:
        whole_measure, passes = trainer.measure, []

        def measure(*arguments, progress, **settings):
            def counted(*now) -> None:
                passes.append(now)
                if len(passes) == what["die_in_evaluation"]:
                    die(f"at pass {len(passes)} of evaluations")
                progress(*now)

            return whole_measure(*arguments, progress=counted, **settings)

        trainer.measure = ending.measure = measure
    if "full" in what and mine:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (what["full"], what["full"]))
    whole, windows = engine.accumulate, []

    def accumulate(run_engine, context, rows, factor, *more):
        windows.append(factor)
        if mine and len(windows) == what.get("fail"):
            raise ZeroDivisionError("made to fail")
        if mine and len(windows) == what.get("memory"):
            import resource

            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**18, used + 2**18))
        bad = mine and len(windows) in what.get("nan", [])
        result = whole(run_engine, context, rows, float("nan") if bad else factor, *more)
        result.loss += what.get("spike", {}).get(str(len(windows)), 0.0)
        return result

    if {"nan", "fail", "spike", "memory"} & set(what):
        trainer.accumulate = engine.accumulate = accumulate


def _watch_saves(rank: int, what: dict, die) -> None:
    """Count the steps of every save; call `die` at the one that `what` names (see `_inject`)."""
    from prosparse import checkpoint, shards

    whole_begin, whole_commit, whole_chunks = checkpoint.Saver.begin, checkpoint.Saver.commit, shards._chunks
    state = {"saving": False, "save": 0, "step": 0}
    counting = threading.Lock()  # an asynchronous save has two threads
    shards.CHUNK = 16384

    def step(what_it_is: str) -> None:
        if state["saving"]:
            with counting:
                state["step"] += 1
                number = state["step"]
            if number == what.get("die_in_save") and state["save"] >= what.get("save", 1):
                die(f"at step {number} of save {state['save']}: {what_it_is}")

    def begin(self, *arguments):
        state.update(saving=True, save=state["save"] + 1, step=0)
        return whole_begin(self, *arguments)

    def commit(self):
        result = whole_commit(self)
        state["saving"] = False
        if "count_in_save" in what:
            with open(f"{what['count_in_save']}-{rank}", "a") as file:
                file.write(f"{state['step']}\n")
        return result

    def chunks(*arguments):
        for chunk in whole_chunks(*arguments):
            step("chunk")
            yield chunk

    def hook(event: str, arguments: tuple) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            step(f"{event} {os.path.basename(str(arguments[0]))}")

    checkpoint.Saver.begin, checkpoint.Saver.commit, shards._chunks = begin, commit, chunks
    sys.addaudithook(hook)


def _child(rank: int, question: dict, port: int) -> None:
    log = os.open(question["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    world = str(question["ranks"])
    os.environ.update(RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 70
    try:
        from prosparse.cli import main

        if question["inject"]:
            _inject(rank, question["inject"])
        if question["verb"].endswith(".py"):
            sys.argv = [question["verb"], *question["start"]]
            runpy.run_path(question["verb"], run_name="__main__")
            code = 0
        else:
            code = main([question["verb"], *question["start"]])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import reloads
    import torch

    torch.set_num_threads(1)
    address = reloads.serve()  # before this process imports prosparse
    import deepspeed

    with suppress(ImportError):  # an engine imports it when it starts, and torch.compile with it, which takes seconds
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import grain  # noqa: F401
    import lm_eval.tasks  # noqa: F401

    import prosparse.harness
    import prosparse.trainer  # noqa: F401
    from prosparse import group
    from prosparse.exporters import hf

    hf.reload_in_fresh_process = partial(reloads.reload, address)
    group.NOTICE_SECONDS = json.loads(sys.argv[1]) or group.NOTICE_SECONDS
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    answers.write("ready\n")
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            pids = []
            for rank in range(question["ranks"]):
                pid = os.fork()
                if pid == 0:
                    sys.stdin.close()
                    _child(rank, question, port)
                pids.append(pid)
            answers.write(json.dumps(pids) + "\n")
        else:
            answers.write(json.dumps(_wait(question["wait"], question["seconds"])) + "\n")
    os._exit(0)  # without the seconds in which Python takes all of it down


def _wait(pids: list[int], seconds: float) -> dict:
    codes: dict[int, int] = {}
    until, hung = time.monotonic() + seconds, False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until and len(codes) < len(pids):
            hung = True
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            until += 30
        time.sleep(0.02)
    return {"codes": [codes[pid] for pid in pids], "hung": hung}


if __name__ == "__main__":
    _serve()
