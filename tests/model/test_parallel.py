from tests.model import two_ranks
from tests.model.small import compressed
from tests.ranks import run_ranks


def test_two_processes(tmp_path, commands):
    """Tensor parallelism (both sides, biases, partly compressed roles) and FSDP2 equal one process."""
    for family in two_ranks.TENSOR_PARALLEL:
        compressed(family).save_pretrained(tmp_path / family)
    run_ranks(commands / "python", "tests.model.two_ranks", str(tmp_path))
