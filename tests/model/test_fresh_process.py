"""Loads in processes that do not import this package, as users have them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import layershare
from layershare.model.hub import save
from tests.families import VOCAB, tiny_model, tokens
from tests.model.small import compressed, logits

CHECK = """
import sys, torch
torch.set_num_threads(1)
folder, dropped, sliced = (f"{sys.argv[1]}/{name}" for name in ("llama", "dropped", "sliced"))
expected = torch.load(sys.argv[1] + "/expected.pt")
@torch.no_grad()
def check(model, name="llama"):
    assert torch.equal(model(expected["ids"]).logits, expected[name])
"""

SCRIPTS = {
    "transformers only": """
from transformers import AutoModelForCausalLM, pipeline
{CHECK}
assert not any(name.startswith("layershare.model") for name in sys.modules)
check(AutoModelForCausalLM.from_pretrained(folder))
check(AutoModelForCausalLM.from_pretrained(dropped), "dropped")
check(AutoModelForCausalLM.from_pretrained(sliced), "sliced")
generator = pipeline("text-generation", folder)
check(generator.model)
assert generator("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w5 w6")
from peft import LoraConfig, get_peft_model
adapted = get_peft_model(generator.model, LoraConfig())  # by the targets that PEFT has for the family
assert "model.layers.0.self_attn.q_proj.coef" in dict(adapted.get_base_model().named_modules())
""",
    "quantizers first": """
import transformers.quantizers.auto as tables  # imports torch, and with it our hook, in its middle
from transformers import AutoModelForCausalLM
{CHECK}
check(AutoModelForCausalLM.from_pretrained(folder))
assert "nonsense" not in tables.AUTO_QUANTIZER_MAPPING
""",
    "autoload off": """
import os, pathlib
from peft import LoraConfig  # before us
from transformers import AutoModelForCausalLM
{CHECK}
for each in (folder, dropped, sliced):
    try:
        AutoModelForCausalLM.from_pretrained(each)
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error), error
    else:
        raise AssertionError(f"{{each}}: loaded at random")
assert "layershare" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
check(model)
again = os.environ["HF_HOME"] + "/again"
model.save_pretrained(again)
assert pathlib.Path(again, "modeling_layershare.py").exists()
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
check(model)
assert model.config.architectures == ["LlamaForCausalLM"]
model.add_adapter(LoraConfig())
""",
    "install alone": """
import sys
from layershare.autoload import install
install()
install()
assert not {{"torch", "transformers"}} & set(sys.modules)
assert sum("layershare" in type(finder).__module__ for finder in sys.meta_path) == 1
""",
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory, tokenizer, words):
    """All scripts, started together: most of their time is imports."""
    folder = tmp_path_factory.mktemp("fresh")
    numbers = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    numbers.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    model = compressed("llama")
    save(model, folder / "llama", PreTrainedTokenizerFast(tokenizer_object=numbers, pad_token="w0"))
    expected = {"ids": tokens(), "llama": logits(model)}
    for name, method in (("dropped", "attention-drop"), ("sliced", "slicegpt")):
        options: dict[str, Any] = {"keep": 0.85, "of": "targets", "blocks": 8, "length": 32}
        small = layershare.compress(
            tiny_model("llama"), tokenizer, method=method, text=words, folder=folder / name, **options
        )
        expected[name] = logits(small)
    torch.save(expected, folder / "expected.pt")
    running = {}
    for name, script in SCRIPTS.items():
        home = tmp_path_factory.mktemp("home")
        environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0" if name == "autoload off" else "1"
        command = [sys.executable, "-c", script.format(CHECK=CHECK), str(folder)]
        running[name] = subprocess.Popen(
            command, env=environment, cwd=Path(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_fresh_process(processes, name):
    output, _ = processes[name].communicate(timeout=300)
    assert processes[name].returncode == 0, output
