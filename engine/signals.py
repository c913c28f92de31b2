"""Signals that end a run: from Ctrl-C, `kill`, a scheduler, or a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from engine.processes import print_once, rank_and_world

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
NUMBERS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Stopped(SystemExit):
    """A signal ends the program. Its exit code is 128 + the signal's number, as in shells."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number
        self.told = False  # whether the user has been told


class Signals:
    """Answers a signal by raising `Stopped`, which ends the program at once.

    While `hold` is true, a training step is under way and must not be interrupted.
    Signals are then only collected in `seen`, and the loop raises `Stopped` after the
    step. The third signal raises even during the step, because the user insists: the step
    may hang. `outcome` says what was saved and how to go on. The user reads it at the
    end.
    """

    def __init__(self, outcome: str):
        self.outcome = outcome
        self.hold = self.ending = False
        self.seen: list[int] = []

    def answer(self, number: int, _=None) -> None:
        self.seen.append(number)
        if len(self.seen) > 5:  # the ending hangs too
            os._exit(128 + number)
        if self.hold and len(self.seen) < 3:
            if rank_and_world()[0] == 0:  # no print: the signal may have interrupted a print
                with contextlib.suppress(OSError):
                    os.write(2, b"signal %d: stopping when this step is done\n" % number)
        elif not self.ending:
            self.end(number)

    def end(self, number: int) -> None:
        self.ending = True
        raise Stopped(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals in this block of steps. Held signals act at its end."""
        self.hold = True
        try:
            yield
        finally:
            self.hold = False
        if self.seen:
            self.end(self.seen[0])

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Let signals end the program at once: between two steps nothing is half done."""
        self.hold = False
        if self.seen:
            self.end(self.seen[0])
        try:
            yield
        finally:
            self.hold = True


@contextlib.contextmanager
def signals_answered(outcome: str, own_process: bool = False) -> Iterator[Signals]:
    """Let `Signals` handle SIGINT, SIGTERM and SIGHUP; print one line at the end.

    With `own_process` the handlers stay, because only the program's exit follows, which a
    second Ctrl-C would interrupt with a traceback. Python allows handlers only in the
    main thread: in other threads none is set.
    """
    signals = Signals(outcome)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        # A SIGHUP that `nohup` ignores stays ignored. Shells ignore SIGINT in background
        # jobs, but `kill -INT` must reach them.
        if handler != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, signals.answer)
    try:
        yield signals
    except Stopped as e:
        if not e.told:
            print_once(f"stopped by signal {e.number}: {signals.outcome}")
        e.told = True
        for handler in before.values():  # an outer block of this kind ends too
            if isinstance(outer := getattr(handler, "__self__", None), Signals):
                outer.ending = True
        if own_process:
            before = {}  # restore none of them
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
