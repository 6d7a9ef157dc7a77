"""Being asked to stop: SIGTERM, SIGUSR1, SIGINT, a STOP file, or a launcher that is gone.

In: signals of this process, a file. Out: `asked()`, a flag that a loop polls, and `Stopped`, raised at once only inside
`interruptible` work, where nothing can be left half done.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
_expendable = False
_stop_file: Path | None = None


def asked() -> str | None:
    """What asked this process to stop; None: nothing did."""
    return _reason


def note(reason: str) -> None:
    """Count `reason` as a request to this process too, if there was none: it ends in peace whatever arrives now."""
    global _reason
    _reason = _reason or reason


def obey(stop_file: Path) -> None:
    """From now on `stop_file`, as soon as it is there, counts as a request too, for as long as this process listens."""
    global _stop_file
    _stop_file = stop_file


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGTERM, SIGUSR1 and SIGINT instead of dying of them; a second SIGINT ends the process at once.

    Under a launcher the end of the launcher counts as a request: DeepSpeed's, killed, would leave its ranks running.
    Without effect outside the main thread, which Python gives no signals.
    """
    global _reason, _stop_file
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own, _reason, _stop_file = os.getpid(), None, None

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:  # a worker process that was forked: the request is not for it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _note(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    # Python runs handlers between two steps of the main thread; one that waits inside a collective takes none. The
    # numbers that arrive here are read by another thread.
    arrived, sender = socket.socketpair()
    sender.setblocking(False)
    old_sender = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    over = threading.Event()
    launcher = _launcher() if "WORLD_SIZE" in os.environ else []
    watch = threading.Thread(target=_watch, args=(launcher, arrived, over), daemon=True)
    watch.start()
    if launcher and _gone_already(launcher):
        _ask("its launcher is gone", signal.SIGTERM)
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(old_sender)
        for number, handler in before.items():  # who was asked once ends in peace: launchers ask again, rank by rank
            signal.signal(number, handler if _reason is None else signal.SIG_IGN)
        with suppress(BlockingIOError):  # full: it wakes up anyway
            sender.send(b"\0")
        watch.join()
        arrived.close()
        sender.close()


@contextmanager
def expendable() -> Iterator[None]:
    """Within, nothing can be lost yet: a request ends the process at once, even where it waits for other ranks."""
    global _expendable
    _expendable = True
    try:
        if _reason is not None:
            raise Stopped(_reason)
        yield
    finally:
        _expendable = False


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
    global _interruptible
    note(number.name)
    if _interruptible:
        _interruptible = False  # once: what cleans up is left in peace
        raise Stopped(_reason)


def _ask(reason: str, number: signal.Signals) -> None:
    note(reason)
    os.kill(os.getpid(), number)


def _launcher() -> list[int]:
    """The parent process; where DeepSpeed's launcher is above, all processes up to it and its runner."""
    chain = [os.getppid()]
    try:
        while chain[-1] > 1:
            found = b"deepspeed.launcher.launch" in _command(chain[-1])
            with open(f"/proc/{chain[-1]}/stat") as file:  # "pid (name) state parent ..."; a name may hold blanks
                chain.append(int(file.read().rpartition(")")[2].split()[1]))
            if found:
                return chain
    except OSError:  # no /proc, or one of them has just ended
        pass
    return chain[:1]


def _gone_already(launcher: list[int]) -> bool:
    """Whether DeepSpeed's launcher, or its runner, ended while this rank was still importing."""
    return "CROSS_RANK" in os.environ and launcher[-1] == 1 and b"deepspeed" not in _command(1)


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _watch(launcher: list[int], arrived: socket.socket, over: threading.Event) -> None:
    """Turn the end of the launcher, or a STOP file, into a signal, once each; obey what the main thread cannot."""
    global _stop_file
    first_interrupt: float | None = None
    while not over.is_set():
        readable, _, _ = select.select([arrived], [], [], LOOK_SECONDS)
        for number in arrived.recv(64) if readable else b"":
            if number in SIGNALS and _expendable:
                os._exit(75)
            if number == signal.SIGINT:
                # Ctrl-C reaches a rank from the terminal and again through its launcher: that is one request.
                if first_interrupt is not None and time.monotonic() - first_interrupt > 1:
                    os._exit(128 + number)
                first_interrupt = first_interrupt or time.monotonic()
        if launcher and _launcher()[: len(launcher)] != launcher:
            launcher = []
            _ask("its launcher is gone", signal.SIGTERM)
        if _stop_file is not None and _stop_file.exists():
            _stop_file = None
            _ask("a STOP file", signal.SIGUSR1)
