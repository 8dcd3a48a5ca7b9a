"""Kernels for smoke runs, forked from a process that has imported what all notebooks import.

Imports take longer than most smoke runs. ``serve SOCKET`` imports once and waits; ``start SOCKET -f
FILE`` stands in a kernel's place: the server forks one, which writes to this process's output, gets
its signals and ends with it. The interpreter, the environment and the code are the same as in a
kernel started cold.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from pathlib import Path

OUTPUTS = (1, 2)


def _message(connection: socket.socket) -> bytes:
    parts = []
    while not parts or not parts[-1].endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def _kernel(request: dict[str, object], outputs: list[int]) -> None:
    """Become the kernel; does not return."""
    for place, given in zip(OUTPUTS, outputs, strict=True):
        os.dup2(given, place)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    sys.argv = ["ipykernel_launcher", *request["arguments"]]  # type: ignore[misc]
    sys.path[0] = ""
    runpy.run_module("ipykernel_launcher", run_name="__main__", alter_sys=True)


def _attend(connection: socket.socket) -> None:
    """Fork a kernel, tell its number and its end; it does not outlive the one who asked."""
    _, outputs, _, _ = socket.recv_fds(connection, 1, len(OUTPUTS))
    request = json.loads(_message(connection))
    kernel = os.fork()
    if kernel == 0:
        connection.close()
        try:
            _kernel(request, outputs)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        os._exit(0)
    for given in outputs:
        os.close(given)
    connection.sendall(f"{kernel}\n".encode())
    while True:
        done, status = os.waitpid(kernel, os.WNOHANG)
        if done:
            connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            return
        if select.select([connection], [], [], 0.05)[0] and not connection.recv(1):
            os.kill(kernel, signal.SIGKILL)
            os.waitpid(kernel, 0)
            return


def serve(path: str) -> None:
    """Import, then fork kernels for whoever connects, until killed."""
    import fmlib

    for module in pkgutil.iter_modules(fmlib.__path__):
        if not module.name.startswith("__"):
            importlib.import_module(f"fmlib.{module.name}")
    for name in ("ipykernel.kernelapp", "ipywidgets", "matplotlib.pyplot", "myst_nb", "seaborn",
                 "timm", "torchvision"):  # fmt: skip
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for attendants
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _attend(connection)
                os._exit(0)
            connection.close()


def start(path: str, arguments: list[str]) -> int:
    """Stand in a kernel's place; its exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": str(Path.cwd()),
        }
        socket.send_fds(connection, [b"k"], list(OUTPUTS))
        connection.sendall(json.dumps(request).encode() + b"\n")
        kernel = int(_message(connection))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda given, _frame: os.kill(kernel, given))
        return int(_message(connection) or -signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    code = start(sys.argv[2], sys.argv[3:])
    if code < 0:  # as the kernel ended
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
