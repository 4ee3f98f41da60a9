import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.model import two_ranks
from tests.model.small import compressed


def test_two_processes(tmp_path):
    """Tensor parallelism (both sides, biases, partly compressed roles) and FSDP2 equal one process."""
    for family in two_ranks.TENSOR_PARALLEL:
        compressed(family).save_pretrained(tmp_path / family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.model.two_ranks", str(tmp_path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
