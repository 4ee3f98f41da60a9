"""Run a module of the tests in several processes that find each other as `torchrun`'s do."""

import os
import signal
import socket
import subprocess
from pathlib import Path

retries = 0
"""How often ranks were started again in this process."""


def run_ranks(python: Path, module: str, *arguments: str, world: int = 2) -> None:
    """Run `PYTHON -m module arguments…` as `world` ranks; an `AssertionError` with what they printed if one fails.

    A rank of torch's CPU collectives has been seen to end with SIGSEGV, rarely and inside a collective step; that, and
    nothing else, is tried a second time, and said. A second crash shows its stack.
    """
    global retries
    codes, outputs = _run(python, module, arguments, world)
    if -signal.SIGSEGV in codes:
        retries += 1
        print(
            f"A rank of {module} ended with SIGSEGV: tried again, retry {retries} of this process.", *outputs, sep="\n"
        )
        codes, outputs = _run(python, module, arguments, world)
    assert not any(codes), "\n".join(outputs)


def _run(python: Path, module: str, arguments: tuple[str, ...], world: int) -> tuple[list[int], list[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    environment |= {"PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    ranks = [
        subprocess.Popen(
            [python, "-m", module, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks], outputs
