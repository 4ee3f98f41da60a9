import pytest
import torch

from tests.healing import two_ranks
from tests.healing.tiny import heal, results_of, text_for, weights
from tests.ranks import run_ranks


def test_two_processes(small, tmp_path, commands):
    """Healing under DDP and FSDP2 ends where one process does; gradients behind gates are checked by the ranks."""
    run_ranks(commands / "python", "tests.healing.two_ranks", str(small), str(tmp_path))
    for name, options in (two_ranks.DDP | two_ranks.FSDP).items():
        alone = heal(small, tmp_path / f"{name}-alone", text=text_for(small, two_ranks.STEPS), **options)
        done = results_of(tmp_path / name)["healing"]
        assert done["processes"] == 2
        for one, two in zip(alone["log"][:-1], done["log"][:-1], strict=True):
            assert one.keys() == two.keys()
            assert two == pytest.approx(one, rel=1e-4, abs=1e-6)
        single, both = weights(tmp_path / f"{name}-alone"), weights(tmp_path / name)
        for key in single:
            torch.testing.assert_close(both[key], single[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
