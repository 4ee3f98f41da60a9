"""`layershare heal` and `layershare.heal` as a person meets them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import layershare
from layershare.cli import main
from layershare.recipe import read_recipe
from layershare.run import run
from tests.families import tiny_model
from tests.healing.tiny import changed, results_of


def heal(commands, here, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [commands / "layershare", "heal", *arguments]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)


TEXT = ("--text", "text.txt", "--length", "16", "--tokens", "512", "--batch-size", "4", "--set", "text.held_out=4")


def test_the_whole_command(small, tmp_path, commands):
    here = small.parent
    (tmp_path / "heal.yaml").write_text("model: another\ntrain: full\nlora: {rank: 2}\nreplace: {start: 0.5}\n")
    test = ("--eval", "text.txt", "--set", "evaluation.blocks=4", "--set", "evaluation.length=16")
    options = ("--recipe", str(tmp_path / "heal.yaml"), "--train", "factors", "--loss", "both", "--replace", *test)
    out = tmp_path / "out"
    done = heal(commands, here, "small", "-o", str(out), *TEXT, *options)
    assert done.returncode == 0, done.stderr
    # Nothing but ours is printed.
    told = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and not line.endswith("…")  # a step
    ]
    kinds = ("Trains ", "step ", "Warning: The model is measured", "write ")
    assert [line for line in told if not line.startswith(kinds) and "tokens per second: about" not in line] == []
    assert "Trains 6.66 thousand of" in done.stderr or "parameters on 512 tokens in 8 steps" in done.stderr
    assert "Before healing:" in done.stdout
    assert "After healing:" in done.stdout
    assert f"The healed model is in {out}." in done.stdout
    settings = results_of(out)["healing"]["settings"]
    assert (Path(settings["model"]).name, settings["train"], settings["replace"]["start"]) == ("small", "factors", 0.5)
    card = (out / "README.md").read_text()
    assert "## Healing" in card
    assert changed(small, out)
    compression = read_recipe(small / "recipe.yaml")
    with pytest.raises(layershare.LayershareError, match="is not empty"):
        run(compression, out)
    again = heal(commands, here, "small", "-o", str(out), *TEXT, *options)
    assert again.returncode == 0
    assert "nothing was done" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nothing",), "There is no folder 'nothing'"),
        (("small", "--train", "all"), "'train' in the recipe: Input should be"),
        (("small", "--train", "deltas", *TEXT), "small' has no deltas to train"),
        (("small", "--set", "lora.rnk=3"), "Unknown key in lora 'rnk'. Did you mean 'rank'?"),
        (("small", "--replace", "--set", "replace.strat=0.1"), "Unknown key in replace 'strat'. Did you mean 'start'?"),
        (("small", "--epochs", "1", "--tokens", "5"), "name one of them"),
        (("small", *TEXT, "--set", "optimizer.name=adam"), "Unknown optimizer 'adam'"),
        (("small", *TEXT, "--set", "optimizer.schedule=cosin"), "Unknown schedule 'cosin'. Did you mean 'cosine'?"),
    ],
)
def test_mistakes_end_in_one_sentence(small, tmp_path, monkeypatch, capfd, arguments, sentence):
    monkeypatch.chdir(small.parent)
    monkeypatch.setattr(sys, "argv", ["layershare", "heal", *arguments, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert sentence in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_in_python(tokenizer, words, tmp_path):
    original = tiny_model("llama")
    options: dict[str, Any] = {"text": words, "blocks": 16, "length": 32}
    options |= {"method": "basis-sharing", "keep": 0.5, "of": "targets"}
    small = layershare.compress(original, tokenizer, **options)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}

    def healing() -> Any:
        return layershare.heal(
            small,
            tokenizer,
            teacher=original,
            loss="both",
            text=words,
            length=16,
            tokens=512,
            batch_size=4,
            lr=1e-2,
            precision="float32",
            folder=tmp_path / "out",
            **{"loss.alpha": 0.25, "text.held_out": 4},
        )

    healed = healing()
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    after = healed.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name in after if name.endswith(".coef.weight")
    }
    used = results_of(tmp_path / "out")["healing"]["settings"]
    assert used["text"]["text"].startswith("strings ")
    assert (used["loss"]["kind"], used["loss"]["alpha"], used["text"]["held_out"]) == ("both", 0.25, 4)
    small = layershare.compress(original, tokenizer, **options)  # as the same script does, in another temporary folder
    with pytest.warns(match="nothing was done"):
        again = healing().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    assert layershare.heal is layershare.heal  # the package that holds it has another name
    assert callable(layershare.heal)


def test_what_is_not_known_of_a_model_in_memory_is_asked_for(tokenizer, words):
    small = layershare.compress(tiny_model("llama"), method="svd", keep=0.5, of="targets")
    with pytest.raises(layershare.LayershareError, match="its tokenizer is not known; give it, too"):
        layershare.heal(small, text=words)
    with pytest.raises(layershare.LayershareError, match="name the original with --teacher"):
        layershare.heal(small, tokenizer, loss="distill", text=words)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # PEFT knows the old name only
def test_a_model_with_adapters_is_refused(small, words):
    model = layershare.load(small)
    get_peft_model(model, LoraConfig(r=2, target_modules=["coef"]))
    with pytest.raises(layershare.LayershareError, match="merge or unload the adapters first"):
        layershare.heal(model, text=words)


def test_a_model_in_memory_is_healed_by_one_process(small, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(layershare.LayershareError, match="save it, and call `layershare heal`"):
        layershare.heal(layershare.load(small), text=words)
