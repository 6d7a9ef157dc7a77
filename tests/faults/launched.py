"""A training under DeepSpeed's own launcher, to break from outside: runner -> launch.py -> ranks.

In: overrides. Out: the processes by what they are, whatever is left of them at the end, what they said, the ranks' exit
codes.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, _port

SCRIPT = "tests/faults/noted.py"


class Launched:
    """One start, in a session of its own, so that every process of it can be found again."""

    def __init__(self, arguments: list[str], ranks: int, log: Path) -> None:
        self.log, self.ranks = log, ranks
        self.offset = log.stat().st_size if log.is_file() else 0
        self.notes = log.with_suffix(".codes")
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        command = [deepspeed, "--num_gpus", str(ranks), "--master_port", _port(), SCRIPT, *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "EXIT_CODES": str(self.notes)}
        with open(log, "a") as file:
            self.runner = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def processes(self) -> dict[int, str]:
        """The command line of every process of the run that lives."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                    if int(session) == self.runner.pid and state != "Z":
                        found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                except OSError:  # it has just ended
                    continue
        return found

    def find(self, who: str) -> int | None:
        """The process id of "runner", "launch.py", "rank 0" or "rank 1"."""
        if who == "runner":
            return self.runner.pid
        sign = "-m deepspeed.launcher.launch" if who == "launch.py" else f"-u {SCRIPT} --local_rank={who[-1]} "
        return next((pid for pid, line in self.processes().items() if sign in line), None)

    def signal(self, number: int, who: str) -> None:
        """`who`: as in `find`, or "all", which is what a terminal does."""
        if who == "all":
            os.killpg(self.runner.pid, number)
        elif (pid := self.find(who)) is not None:
            os.kill(pid, number)

    def running(self) -> bool:
        return self.runner.poll() is None

    def wait(self, seconds: float) -> list[str]:
        """Wait until no process is left; the command lines of those that are, after `seconds`, which are killed."""
        until = time.monotonic() + seconds
        while self.processes() and time.monotonic() < until:
            self.runner.poll()
            time.sleep(0.1)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.runner.wait()
        return list(left.values())

    def codes(self) -> list[int | None]:
        """The exit code of each rank; None for one that was killed."""
        notes = [self.notes / str(rank) for rank in range(self.ranks)]
        return [int(note.read_text()) if note.is_file() else None for note in notes]

    def text(self) -> str:
        """What it has said so far."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.offset)
            return file.read()
