"""Peers' own code beside ours: what needs no peer of it. Refusals, what stands in for CUDA, counts, folders, tables."""

import pytest
import torch

from benchmarks.peers.driver import OnCPU, parameters, write
from benchmarks.peers.run import commits_of
from benchmarks.peers.tables import peers_page
from benchmarks.results import Results
from layershare.model.describe import describe
from layershare.model.hub import load
from tests.families import WIDTH, tiny_model

MACHINE = {"processor": "one", "threads": 1, "cores": 1}
VERSIONS = {"layershare": "0", "torch": "2", "transformers": "5"}


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        ("zs-vsd", "Unknown peer 'zs-vsd'. Did you mean 'zs-svd'?"),
        ("zs-svd", "'{folder}' is no git checkout; clone the repository of zs-svd there."),
    ],
)
def test_a_wrong_peer_is_one_sentence(peer, says, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit) as error:
        commits_of({peer: str(tmp_path)})
    assert str(error.value) == says.format(folder=tmp_path)


def test_what_asks_for_cuda_gets_the_cpu():
    with OnCPU():
        found = [torch.ones(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to(torch.device("cuda"))]
        found += [torch.nn.Linear(2, 2).to("cuda").weight, torch.nn.Linear(2, 2).cuda().weight]
    assert {each.device.type for each in found} == {"cpu"}


def test_a_peers_factors_are_counted_once_and_written_as_their_products(tokenizer, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    basis, *own = torch.randn(3, 5, WIDTH).unbind()
    factors = {name: [coefficients.T, basis] for name, coefficients in zip(names, own, strict=True)}
    spec = describe(model.config)
    assert parameters(spec, factors) == parameters(spec, {}) - 2 * WIDTH * WIDTH + 3 * 5 * WIDTH

    torch.nn.init.constant_(model.model.norm.weight, 2.0)  # as if the peer had trained it
    write(model, factors, str(tmp_path / "model"), tmp_path / "out")
    written = load(tmp_path / "out").state_dict()
    for name, coefficients in zip(names, own, strict=True):
        assert torch.equal(written[f"{name}.weight"], coefficients.T @ basis)
    assert torch.equal(written["model.norm.weight"], model.model.norm.weight)


def result(keep: float, value: float, **more: object) -> dict:
    """A result as far as tables need it."""
    text = {"source": "novels", "blocks": 2, "length": 8, "tokens_sha256": "test"}
    test = {"text": text, "perplexity": {"value": value}, "original_perplexity": {"value": 10.0}}
    experiment = {"keep": keep, "model_fingerprint": "weights", "peer": "zs-svd", "commit": "0123456789"}
    shared = {"calibration": {"tokens_sha256": "calibration"}, "evaluations": [test], "date": "2026-11-28T00:00"}
    return {"experiment": experiment, **shared, "machine": MACHINE, "versions": VERSIONS, **more}


def test_the_table_is_ordered_marked_and_of_the_same_texts(tmp_path):
    peers, auto = Results(tmp_path / "peers.jsonl"), Results(tmp_path / "auto.jsonl")
    assert peers_page(peers, auto, "tiny").startswith("Not measured yet")
    sizes = {"exact": {"parameters": 80, "of": 100}, "off": {"parameters": 79, "of": 100}}
    peers.put("tiny/zs-svd-0.8", result(0.8, 11.0, kept=sizes["exact"]))
    peers.put("tiny/svd-llm-0.8", result(0.8, 12.0, kept=sizes["off"]))
    peers.put("tiny/svd-llm-0.5", result(0.5, 20.0, kept={"parameters": 50, "of": 100}))
    auto.put("tiny/auto-0.8", result(0.8, 10.0))
    lines = peers_page(peers, auto, "tiny").splitlines()
    assert lines[4:7] == [
        "| svd-llm, its own code | +0.1823 † | +0.6931 |",
        "| zs-svd, its own code | +0.0953 |  |",
        "| auto, ours | +0.0000 |  |",
    ]
    assert "The peers' commits: zs-svd 0123456;" in lines[-1]

    auto.put("tiny/auto-0.8", result(0.8, 10.0, calibration={"tokens_sha256": "another"}))
    with pytest.raises(ValueError, match="different calibration texts"):
        peers_page(peers, auto, "tiny")
