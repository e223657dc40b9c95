"""What a process asks of its surroundings.

It dies with its parent: killing the flow or DVC must leave nobody that goes on writing. It keeps the memory it frees.

`python -m lyrics.process MODULE ARGUMENT…` runs a module so.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import psutil

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.5
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back to the kernel, and use it again.

    Networks free and ask for the same large blocks all the time; the page faults of blocks that are new each time took
    half of a step on a virtual machine.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)


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
    """End all descendants of this process."""
    kill_all(psutil.Process().children(recursive=True))


def kill_tree(pid: int) -> None:
    """End a process and all its descendants."""
    try:
        root = psutil.Process(pid)
        kill_all([root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return


def kill_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=_POLL_SECONDS)


def end_with_me(process: psutil.Process) -> None:
    """Have a process that others started below this one killed when this one dies, however it dies."""
    # The guard reads a pipe of which this process holds the only other end: the kernel closes that in every case.
    code = (
        "import psutil, sys; pid, born = int(sys.argv[1]), float(sys.argv[2]); sys.stdin.read()\n"
        "if psutil.pid_exists(pid) and psutil.Process(pid).create_time() == born: psutil.Process(pid).kill()"
    )
    command = [sys.executable, "-c", code, str(process.pid), repr(process.create_time())]
    _GUARDS.append(subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))


_GUARDS: list[subprocess.Popen[bytes]] = []  # a collected Popen would close the pipe


if __name__ == "__main__":
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
