"""Being asked to stop: SIGTERM, SIGUSR1, SIGINT, a STOP file, or a launcher that is gone.

In: signals of this process, a file. Out: `asked()`, a flag that a loop polls, and `Stopped`, raised at once only inside
`interruptible` work, where nothing can be left half done.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOOK_SECONDS = 0.5  # between two looks at the launcher and the STOP file
T = TypeVar("T")


class Stopped(BaseException):
    """A request to stop, raised where it is safe. No Exception, so that nothing takes it for a failure."""


_reason: str | None = None
_interruptible = False
_first_interrupt: float | None = None
_stop_file: Path | None = None


def asked() -> str | None:
    """What asked this process to stop; None: nothing did."""
    return _reason


def obey(stop_file: Path) -> None:
    """From now on `stop_file`, as soon as it is there, counts as a request too, for as long as this process listens."""
    global _stop_file
    _stop_file = stop_file


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying of them; a second SIGINT ends the process at once.

    Under a launcher the end of the launcher counts as a SIGTERM: DeepSpeed's, killed, would leave its ranks running.
    Without effect outside the main thread, which Python gives no signals.
    """
    global _reason, _first_interrupt, _stop_file
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own, _reason, _first_interrupt, _stop_file = os.getpid(), None, None, None

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a worker process that was forked: the request is not for it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _note(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    over = threading.Event()
    launcher = _launcher() if "WORLD_SIZE" in os.environ else []
    if launcher and _gone_already(launcher):
        os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=_watch, args=(launcher, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        for number, handler in before.items():  # who was asked once ends in peace: launchers ask again, rank by rank
            signal.signal(number, handler if _reason is None else signal.SIG_IGN)


def interruptible(function: Callable[[], T]) -> Callable[[], T]:
    """`function`, which has to leave nothing half done, so that a request to stop raises Stopped inside it at once."""

    def run() -> T:
        global _interruptible
        if _reason is not None:
            raise Stopped(_reason)
        before, _interruptible = _interruptible, True
        try:
            return function()
        finally:
            _interruptible = before

    return run


def _note(number: signal.Signals) -> None:
    global _reason, _interruptible, _first_interrupt
    if number is signal.SIGINT:
        # Ctrl-C reaches a rank from the terminal and again through its launcher: that is one request.
        if _first_interrupt is not None and time.monotonic() - _first_interrupt > 1:
            os._exit(128 + number)
        _first_interrupt = _first_interrupt or time.monotonic()
    _reason = _reason or number.name
    if _interruptible:
        _interruptible = False  # once: what cleans up is left in peace
        raise Stopped(_reason)


def _launcher() -> list[int]:
    """The parent process, and the one above it where the parent is DeepSpeed's and has its runner above."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in _command(parent):
            return [parent]
        with open(f"/proc/{parent}/stat") as file:  # "pid (name) state parent ..."; a name may hold blanks
            return [parent, int(file.read().rpartition(")")[2].split()[1])]
    except OSError:  # no /proc, or the parent has just ended
        return [os.getppid()]


def _gone_already(launcher: list[int]) -> bool:
    """Whether DeepSpeed's launcher, or its runner, ended while this rank was still importing."""
    if "CROSS_RANK" not in os.environ or not Path("/proc/self").exists():
        return False
    return len(launcher) == 1 or (launcher[1] == 1 and b"deepspeed" not in _command(1))


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _watch(launcher: list[int], over: threading.Event) -> None:
    """Turn the end of the launcher, or a STOP file, into a signal, once each."""
    global _stop_file
    while not over.wait(LOOK_SECONDS):
        if launcher and _launcher()[: len(launcher)] != launcher:
            launcher = []
            os.kill(os.getpid(), signal.SIGTERM)
        if _stop_file is not None and _stop_file.exists():
            _stop_file = None
            os.kill(os.getpid(), signal.SIGUSR1)
