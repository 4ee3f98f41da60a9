"""`bench --engine vllm`: what it tells of folders that vLLM serves, and of those that it does not."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import layershare
from layershare.errors import LayershareError
from layershare.model.hub import save
from layershare.serve.speed import engine
from tests.families import tiny_model
from tests.model.small import compressed
from tests.serve.engine import config_of

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `make test-vllm`")


@pytest.fixture
def dense(tmp_path) -> Path:
    tiny_model("llama", config=config_of("llama")).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def bench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    work = ("--prompt", "8", "--new", "3", "--rounds", "1", "--dtype", "float32")
    command = [sys.executable, "-m", "layershare", "bench", *arguments, *work, "--engine", "vllm"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}  # as anybody's
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_folder_and_its_original_take_turns(dense):
    save(compressed("llama", config=config_of("llama")), dense.parent / "small")
    done = bench("small", "--original", "dense", "--batch", "1", "--batch", "3", folder=dense.parent)
    assert done.returncode == 0, done.stderr
    speed = json.loads((dense.parent / "small" / "speed.json").read_text())
    assert speed["engine"].startswith("vllm")
    assert (speed["dtype"], speed["device"]) == ("float32", "cpu")
    assert [(rate["phase"], rate["batch"]) for rate in speed["rates"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("prefill", 3),
        ("decode", 3),
    ]
    assert all(min(rate["model"], rate["original"], rate["ratio"]) > 0 for rate in speed["rates"])
    assert all(min(rate["latency"], rate["original_latency"]) > 0 for rate in speed["rates"])
    assert min(speed["memory"], speed["original_memory"]) > 10**8  # Python and vLLM among it


def test_a_folder_that_cannot_be_served_is_refused_with_the_same_sentence(tokenizer, words, tmp_path):
    options: dict[str, Any] = {"keep": 0.85, "of": "targets", "text": words, "blocks": 8, "length": 32}
    model = tiny_model("llama", config=config_of("llama"))
    layershare.compress(model, tokenizer, method="slicegpt", folder=tmp_path / "sliced", **options)
    done = bench("sliced", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("Error: vLLM cannot serve a sliced model") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sliced" / "speed.json").exists()


def test_prompts_are_read_at_once_or_not_at_all(dense):
    prompts = torch.randint(100, (2, 8))
    few = {"num_gpu_blocks_override": 2, "enforce_eager": True, "dtype": "float32"}  # one of which is vLLM's own
    with engine(str(dense), rows=2, length=16, **few) as running:
        assert running.seconds(prompts[:1], 3)["decode"] > 0
        with pytest.raises(LayershareError, match="no room for 2 prompts at once: take smaller batches"):
            running.seconds(prompts, 3)
