"""The end of a command by SIGTERM, as from ``docker stop``, a time limit of SLURM, and ``timeout``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

TERMINATED = 128 + signal.SIGTERM
"""The exit code that a shell shows of a process that SIGTERM has ended."""
PATIENCE = 5
"""Seconds for the end of other processes."""


@contextmanager
def cleaned_up_when_terminated() -> Iterator[None]:
    """SIGTERM is a SystemExit of the main thread within this context, so that temporary files are removed.

    Native code that the main thread runs comes to its end first. A second SIGTERM, which ``timeout`` sends, changes nothing.
    SIGTERM often goes to all processes of a command, and ends those of nnU-Net at once. A pool of them may then wait forever
    for a lock that one of them held. Such a wait is interrupted after ``PATIENCE`` seconds by the same exception again.

    Threads beside the main one, processes that handle or ignore SIGTERM already, and Windows are left as they are. No pool may
    be forked within this context: Python forgets a signal that reaches a process which has just been forked.
    """
    ours = os.name == "posix" and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    end = partial(_end, os.getpid())
    alarm = signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(process: int, *_: object) -> None:
    if os.getpid() != process:  # a fork, which ends as it would without this handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if multiprocessing.active_children():
        signal.alarm(PATIENCE)
    raise SystemExit(TERMINATED)
