"""A `python` for tests whose processes need no imports of their own: it is there in a moment, where a fresh one takes
seconds for torch and transformers.

A server has imported what this package uses of others (nothing of its own), and has run nothing. A request to it is
what a process is given: arguments, folder, environment, and the three standard streams. Each is carried out by a fork
of the server, which is a process as any other: nothing of it is seen by the next, and who stops or kills the one that
asks stops or kills it. Tests of start-up itself take `sys.executable`, which is a fresh one. That is started here, too,
where the environment has other settings that are read at imports, and on systems other than Linux.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import NoReturn

IMPORTED = (
    "multiprocessing.spawn",  # which remembers the real `sys.executable`
    "accelerate",
    "datasets",
    "peft",
    "scipy.linalg",
    "scipy.optimize",
    "torch.distributed.tensor",
    "transformers.generation",
    "transformers.modeling_utils",
    "transformers.pipelines",
    "transformers.trainer",
)
AT_IMPORT = ("ACCELERATE_TORCH", "HF_", "LC_", "LD_", "MKL_", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_")
"""How the names of variables begin that are read when Python starts or a package is imported."""
READ_LATER = ("PYTHONPATH", "PYTHONFAULTHANDLER")
"""Those of them that a fork takes over nevertheless."""
COMMAND = "import sys; from layershare.__main__ import main; sys.argv[0] = 'layershare'; sys.exit(main())"


def write_commands(folder: Path, address: str) -> None:
    """Write `python` and `layershare`, which ask the server at this address."""
    for name, first in (("python", ""), ("layershare", f'-c "{COMMAND}" ')):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" "{address}" {first}"$@"\n')
        script.chmod(0o755)


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(AT_IMPORT) and key not in READ_LATER}


def ask(address: str, arguments: list[str]) -> int:
    """Let a fork of the server do what `python ARGUMENTS…` does here; its exit code."""
    if sys.platform != "linux" or arguments[0] not in ("-c", "-m"):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile()
        fork = int(answers.readline())
        if not fork:
            os.execv(sys.executable, [sys.executable, *arguments])
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _: os.kill(fork, number))
        code = int(answers.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(listener: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Import, then fork for each request until standard input ends; returns, in the fork, arguments and environment."""
    for name in IMPORTED:
        import_module(name)
    threads = {Path(f"/proc/self/task/{each}/comm").read_text().strip() for each in os.listdir("/proc/self/task")[1:]}
    assert threads <= {"jemalloc_bg_thd"}, threads  # pyarrow's, which looks after forks; others would be lost in them
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            sys.exit()
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _fork(client)
        client.close()


def _fork(client: socket.socket) -> tuple[list[str], dict[str, str]]:
    """Between client and fork: kill the one where the other ends early, tell how it ended. Returns in the fork."""
    head, streams, _, _ = socket.recv_fds(client, 4, 3)
    received = client.makefile("rb").read(int.from_bytes(head, "big"))
    arguments, folder, environment = json.loads(received)
    if read_at_import(environment) != read_at_import(dict(os.environ)):
        client.sendall(b"0\n")
        os._exit(0)
    fork = os.fork()
    if fork:
        client.sendall(f"{fork}\n".encode())
        ended = os.pidfd_open(fork)
        ready, _, _ = select.select([ended, client], [], [])
        if ended not in ready:
            os.kill(fork, signal.SIGKILL)
            os._exit(0)
        _, status = os.waitpid(fork, 0)
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    return arguments, environment


def become(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be what Python is when it starts with these, until it ends."""
    import atexit
    import faulthandler
    import random
    import runpy
    import threading
    import traceback
    from io import TextIOWrapper
    from types import ModuleType

    kind, what, *more = arguments
    ours, theirs = (each.get("PYTHONPATH", "").split(os.pathsep) for each in (os.environ, environment))
    installed = [path for path in sys.path[1:] if path not in ours]
    sys.path[:] = ["" if kind == "-c" else os.getcwd(), *filter(None, theirs), *installed]
    os.environ.clear()
    os.environ.update(environment)
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # the server's remember what kind of file they are
        old, lines = getattr(sys, name), name == "stderr" or os.isatty(number)
        binary = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115
        new = TextIOWrapper(binary, encoding=old.encoding, errors=old.errors, line_buffering=lines)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    random.seed()
    code = 0
    try:
        if kind == "-m":
            sys.argv = [what, *more]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *more]
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    # As Python ends, but without freeing one by one what the server has imported.
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        python, listening = sys.argv[2:]
        given = serve(socket.socket(fileno=int(listening)))
        sys.executable = python  # the processes that it starts are of this kind, too
        become(*given)
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
