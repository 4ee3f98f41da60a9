"""`layershare export`: what it writes for other programs, and what it refuses."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import layershare
from layershare.errors import LayershareError
from layershare.exporting import NEEDED, _require_same
from layershare.model.composition import deltas, shared
from layershare.model.hub import LayershareConfig, load
from layershare.model.swap import member_of
from tests.families import CONFIGS, OPTIONS, tiny_model, tokens
from tests.healing.tiny import compress_tiny
from tests.model.small import adopt, filled
from tests.test_docs import blocks, run_bash, run_python

GRAPHS = [
    pytest.param(
        to,
        marks=pytest.mark.skipif(
            not all(find_spec(package.partition(".")[0]) for package in packages),
            reason=f"{to} is not installed: `make test-exports`",
        ),
    )
    for to, packages in NEEDED.items()
]


EVERYTHING = pytest.mark.skipif(find_spec("openvino") is None, reason="takes minutes: `make test-exports`")


@pytest.fixture
def small(tmp_path, tokenizer, monkeypatch) -> Path:
    """In `small`, in the working directory, a model of two blocks with one of each thing that may be in a matrix's
    place: bases shared on either side, one of them pivoted and with private directions beside it, and deltas."""
    monkeypatch.chdir(tmp_path)
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 2
    model = tiny_model("llama", config=config)
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    q, o, down = (
        [member_of(f"layers.{block}.{name}", model.get_submodule(f"model.layers.{block}.{name}")) for block in (0, 1)]
        for name in names
    )
    compositions = [
        shared(q, 6, "input", private_rank=2, pivot=True),
        shared(o, 6, "output"),
        deltas(down, 6, [down[1].name]),
    ]
    filled(adopt(model, LayershareConfig(compositions))).save_pretrained("small")
    tokenizer.save_pretrained("small")
    return tmp_path / "small"


def logits_of(folder: Path, to: str, ids: torch.Tensor) -> torch.Tensor:
    """What an exported graph makes of a prompt."""
    rows, length = ids.shape
    call = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((rows, length), np.int64),
        "position_ids": np.arange(length)[None].repeat(rows, 0),
    }
    if to == "openvino":
        import openvino  # pyright: ignore[reportMissingImports]

        graph = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU")
        return torch.from_numpy(graph(call | {"beam_idx": np.arange(rows, dtype=np.int32)})["logits"].copy())
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    for each in session.get_inputs():
        if each.name not in call:
            call[each.name] = np.zeros((rows, each.shape[1], 0, each.shape[3]), np.float32)
    return torch.from_numpy(session.run(["logits"], call)[0])


@pytest.mark.parametrize("to", GRAPHS)
def test_a_graph_computes_the_same_and_has_what_is_shared_once(small, commands, to):
    # In a process of its own, since pytest would collect all that torch logs while it traces.
    command = [commands / "layershare", "export", "small", "-o", "graph", "--to", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"The {to} model is in graph.\n"), done.stderr
    assert done.stderr.splitlines() == ["export …", "check …"]
    model: Any = load(small)
    for rows, length in ((1, 5), (4, 9)):  # neither is what it was traced or checked with
        ids = tokens(rows, length)
        with torch.no_grad():
            torch.testing.assert_close(logits_of(Path("graph"), to, ids), model(ids).logits, rtol=1e-4, atol=1e-5)
    stored = sum(path.stat().st_size for path in Path("graph").iterdir() if path.suffix in (".bin", ".data"))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9 * 4 * numbers < stored < 4 * numbers + 1024  # small tensors may stand in the other file
    assert str(Path(layershare.__file__).parent).encode() not in (
        b"".join(path.read_bytes() for path in Path("graph").iterdir() if path.is_file())
    )
    layershare.verify("graph")
    assert not hasattr(AutoConfig.from_pretrained("graph"), "quantization_config")
    assert AutoTokenizer.from_pretrained("graph").get_vocab() == AutoTokenizer.from_pretrained("small").get_vocab()

    with torch.no_grad():
        model.lm_head.weight[0] += 1
    with pytest.raises(LayershareError, match=f"The {to} graph of 'small' computes something else than the model"):
        _require_same(model, Path("graph"), "small", to)


@pytest.mark.parametrize(
    ("to", "method", "options"),
    [
        ("onnx", "basis-sharing", {"pivot": True}),
        ("openvino", "delta", OPTIONS["delta"]),
        ("onnx", "auto", OPTIONS["auto"]),
        ("openvino", "slicegpt", {}),
        ("onnx", "joint-drop", {}),
    ],
)
@EVERYTHING
def test_what_methods_make_is_exported(tmp_path, tokenizer, words, to, method, options):
    small = compress_tiny(tmp_path, tokenizer, words, method=method, options=options, keep=0.7)
    layershare.export(small, tmp_path / "graph", to=to)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected: Any = load(small)(ids)
    torch.testing.assert_close(logits_of(tmp_path / "graph", to, ids), expected.logits, rtol=1e-3, atol=1e-4)


@EVERYTHING
def test_matrices_of_integers_are_exported_as_floats(small):
    layershare.quantize("small", "small-8bit", bits=8)
    layershare.export("small-8bit", "graph", to="openvino")
    ids = tokens(2, 7)
    with torch.no_grad():
        expected: Any = load("small-8bit")(ids)
    torch.testing.assert_close(logits_of(Path("graph"), "openvino", ids), expected.logits, rtol=1e-3, atol=1e-4)


@EVERYTHING
def test_the_page_about_clients_runs(tmp_path, commands):
    page = (Path(__file__).parents[1] / "docs" / "clients.md").read_text(encoding="utf-8")
    printed = run_bash(commands, "\n".join(blocks("bash", page)), tmp_path)
    assert "The onnx model is in small-onnx." in printed
    assert "The openvino model is in small-openvino." in printed
    for script in blocks("python", page):
        assert run_python(commands, script, tmp_path).startswith("def main():")


def test_bad_input(small, run, monkeypatch):
    (small.parent / "full").mkdir()
    (small.parent / "full" / "file").write_text("")
    for arguments, message in {
        ("small", "-o", "out", "--to", "gguf"): "Unknown target 'gguf'. Known: dense, onnx, openvino.",
        ("small", "-o", "out", "--to", "onyx"): "Unknown target 'onyx'. Did you mean 'onnx'?",
        ("small", "-o", "full", "--to", "onnx"): "The output folder 'full' is not empty",
        ("nowhere", "-o", "out", "--to", "onnx"): "Unknown model 'nowhere'",
    }.items():
        code, _, err = run("export", *arguments)
        assert (code, message in err) == (2, True), err
    for to, packages in NEEDED.items():
        monkeypatch.setitem(sys.modules, packages[0], None)
        code, _, err = run("export", "small", "-o", "out", "--to", to)
        assert code == 2
        assert f"Error: To export to {to}, have {packages[0]}" in err
        assert f"`pip install '.[{to}]'` in a checkout of layershare." in err
    assert not Path("out").exists()
