"""A process that dies with its parent: killing the flow or DVC must leave nobody that goes on writing."""

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5


def die_with_parent() -> None:
    """Have this process killed when whoever started it dies.

    Linux does it in the kernel. Everywhere a thread also looks after the parents, because a shell between DVC and the
    command may outlive DVC.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watched = _parents()
    if watched:
        threading.Thread(target=_watch, args=(watched,), daemon=True, name="parent-watch").start()


def _parents() -> list[psutil.Process]:
    """The direct parent and, while that is a shell which only carries a command, the one above it."""
    parents: list[psutil.Process] = []
    try:
        process = psutil.Process().parent()
        while process is not None:
            parents.append(process)
            if "-c" not in process.cmdline()[1:-1] or "sh" not in process.name():
                break
            process = process.parent()
    except psutil.Error:
        pass  # a parent of another user: what is known of it so far is watched
    return parents


def _watch(parents: list[psutil.Process]) -> None:
    while all(parent.is_running() for parent in parents):
        time.sleep(_POLL_SECONDS)
    kill_children()
    os._exit(1)


def kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
