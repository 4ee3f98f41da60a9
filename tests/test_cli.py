"""The command line as a person meets it: what it prints, how it ends, what it leaves behind."""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import layershare as package
from layershare.cli import main
from layershare.cli.options import METHOD_NAMES
from layershare.methods import METHODS
from layershare.methods.catalogue import paper_of
from layershare.report.listing import listing
from layershare.store import write_json
from layershare.units import size
from tests.families import tiny_model, tokens
from tests.report.made_up import make_run

pytestmark = pytest.mark.filterwarnings("ignore:The text has .* tokens, fewer")


@pytest.fixture
def here(tmp_path, tokenizer, words, monkeypatch):
    """A folder with a tiny model and a text, which is the working directory."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(words))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def layershare(monkeypatch, capfd):
    """Call the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layershare", *arguments])
        monkeypatch.setattr("layershare.cli.output.console", Console(width=160))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


COMPRESS = ("compress", "dense", "-o", "small", "-m", "basis-sharing")
COMPRESS += ("--text", "text.txt", "--blocks", "24", "--length", "64")


def test_help_does_not_import_torch():
    script = (
        "import sys; sys.argv = ['layershare', '--help']\n"
        "from layershare.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for verb in [
        "run",
        "compress",
        "plan",
        "methods",
        "calibrate",
        "heal",
        "quantize",
        "eval",
        "bench",
        "report",
        "export",
        "verify",
        "ls",
        "generate",
    ]:
        assert f"  {verb} " in shown


def test_help_names_every_method(layershare):
    _, out, _ = layershare("compress", "--help")
    unwrapped = re.sub(r"-\s+", "-", out)
    assert set(METHODS) <= set(re.findall(r"[a-z]+(?:-[a-z]+)*", unwrapped))
    assert set(METHODS) == set(METHOD_NAMES)


def test_no_help_is_cut_or_shows_a_type_of_python(layershare, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = layershare("--help")
    verbs = dict(re.findall(r"^  (\w+)  +(.*)$", out.partition("Commands:")[2], re.MULTILINE))
    assert all(line.endswith(".") and not line.endswith("...") for line in verbs.values()), verbs
    for verb in verbs:
        assert "list[" not in layershare(verb, "--help")[1]


def test_methods(layershare, monkeypatch):
    code, out, _ = layershare("methods")
    assert code == 0
    for name in METHODS:
        assert f"{name} " in out
        assert name in ("svd", "auto") or paper_of(name)
    assert "Needs a text and gradients and the whole model in memory." in out
    entries = {entry["name"]: entry for entry in json.loads(layershare("methods", "--json")[1])}
    needs = {
        name: [entry[key] for key in ("text", "gradients", "whole_model", "training")]
        for name, entry in entries.items()
    }
    assert needs["svd"] == needs["welore"] == [False, False, False, False]
    assert needs["fwsvd"] == [True, True, True, False]
    assert needs["asvd"] == needs["laco"] == [True, False, True, False]
    assert needs["delta"] == [True, False, False, True]
    assert needs["slicegpt"] == [True, False, False, False]
    assert entries["shortgpt"]["sizes"] == "steps of a block"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_consoles_that_lack_letters(encoding, here, monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding, write_through=True))
    measured = ("--eval", "text.txt", "--length", "64", "--set", "evaluation.blocks=2")
    for arguments in (
        ("compress", "dense", "-o", "δ", "--method", "svd", *measured),
        ("ls", "."),
        ("bench", "δ", "--batch", "2", "--prompt", "8", "--new", "3", "--rounds", "1"),
        ("methods",),
        ("generate", "δ", "naïve – 你好 δ", "--tokens", "2"),
        ("eval", "where–ever"),
        ("compress", "--help"),
    ):
        monkeypatch.setattr(sys, "argv", ["layershare", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == (2 if "where–ever" in arguments else 0), arguments
    text = written.getvalue().decode(encoding)
    dash, times = ("-", "x") if encoding == "ascii" else ("–", "×")
    assert f"0{dash}3" in text
    assert f"32 {times} 32" in text
    assert "The compressed model is in ?." in text
    assert f"Unknown model 'where{dash}ever'" in text


def test_json_is_all_that_is_on_standard_output(layershare, here):
    for arguments in (
        ("plan", "dense", "-m", "svd", "--json"),
        ("eval", "dense", "--text", "text.txt", "--blocks", "2", "--json"),
    ):
        code, out, err = layershare(*arguments)
        assert code == 0, err
        json.loads(out)


def test_a_plan_says_how_long_the_run_takes(layershare, here):
    code, out, _ = layershare(
        "plan",
        "dense",
        "-m",
        "basis-sharing",
        "--text",
        "stdlib",
        "--blocks",
        "2",
        "--length",
        "64",
        "--effort",
        "blocks",
    )
    assert code == 0
    assert re.search(r"about \d+(\.\d)? s on this machine \(cpu, 1 thread\)", " ".join(out.split()))
    code, long, _ = layershare(
        "plan", "dense", "-m", "basis-sharing", "--blocks", "1000000", "--length", "64", "--set", "calibration.seed=1"
    )
    assert re.search(r"about [\d.]+ (min|h|days) on this machine", " ".join(long.split()))


def test_version(layershare):
    assert layershare("--version")[1] == f"layershare {version('layershare')}\n"
    assert package.__version__ == version("layershare")


def test_plan_from_a_config_alone(layershare, here):
    (here / "dense" / "model.safetensors").unlink()
    code, out, _ = layershare(
        "plan", "dense", "-m", "basis-sharing", "--keep", "0.7", "--of", "targets", "-O", "group_size=4"
    )
    assert code == 0
    assert "1 × 4 (input)" in out
    assert "of memory" in out
    code, out, _ = layershare("plan", "dense", "-m", "basis-sharing", "--json", "-o", "plan.json")
    plan = json.loads(out)
    assert plan == json.loads((here / "plan.json").read_text())
    assert plan["after"]["all"]["parameters"] <= 0.8 * plan["before"]["all"]["parameters"]


def test_compress_list_evaluate_generate_export(layershare, here):
    code, out, err = layershare(*COMPRESS, "--eval", "stdlib", "--set", "evaluation.blocks=2")
    assert code == 0, err
    assert "top-1 agreement" in out
    small = AutoModelForCausalLM.from_pretrained(here / "small")

    measured = json.loads((here / "small" / "results.json").read_text())["evaluation"]
    code, out, _ = layershare("eval", "small", "--text", "stdlib", "--blocks", "2", "--json")
    assert json.loads(out)["perplexity"] == measured["perplexity"]
    assert json.loads(out)["text"]["length"] == 128  # the model's context, though calibration took less

    code, out, _ = layershare("ls", ".")
    assert f"{measured['perplexity']['value']:.4g} (128)" in out
    assert code == 0
    assert "basis-sharing" in out
    assert out.count("small") == 1

    code, out, _ = layershare("eval", "small", "--text", "text.txt", "--original", "dense", "--json", "-o", "e.json")
    assert code == 0
    assert json.loads(out) == json.loads((here / "e.json").read_text())["evaluation"]

    code, out, _ = layershare("generate", "small", "hello", "--tokens", "5")
    assert code == 0
    assert out.startswith("hello")

    code, out, _ = layershare("export", "small", "-o", "wide", "--to", "dense")
    assert code == 0
    dense = AutoModelForCausalLM.from_pretrained(here / "wide")
    assert {type(m).__name__ for m in dense.modules()}.isdisjoint({"ComposedLinear", "SharedLinear"})
    assert "quantization_config" not in json.loads((here / "wide" / "config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens()).logits, small(tokens()).logits, rtol=1e-3, atol=1e-4)


def test_refine(layershare, here):
    code, _, err = layershare(*COMPRESS, "--effort", "blocks", "--set", "refine.epochs=1", "--set", "refine.lr=0.001")
    assert code == 0, err
    noted = json.loads((here / "small" / "results.json").read_text())["refine"]
    settings = noted["settings"]
    assert (settings["epochs"], settings["lr"], len(noted["blocks"])) == (1, 0.001, 4)
    code, _, err = layershare("compress", "dense", "-o", "same", "--method", "svd", "--keep", "1", "--effort", "blocks")
    assert code == 2
    assert "there are no factors to train" in err
    assert not (here / "same").exists()


def test_distil(layershare, here):
    less = ("--set", "refine.epochs=1", "--set", "distill.tokens=512", "--set", "distill.batch_size=4")
    code, out, err = layershare(*COMPRESS, "--effort", "distill", *less)
    assert code == 0, err
    assert "refined" in out + err
    assert "distilled" in out + err
    noted = json.loads((here / "small" / "results.json").read_text())["distill"]
    assert noted["settings"] == {"tokens": 512, "lr": None, "batch_size": 4}
    code, _, err = layershare("compress", "dense", "-o", "other", "--effort", "most")
    assert code == 2
    assert "'effort' in the recipe: Input should be 'closed', 'blocks' or 'distill'" in err


def test_every_run_has_pages_and_a_report_shows_its_speed(layershare, here):
    code, _, err = layershare(*COMPRESS)
    assert code == 0, err
    assert "library_name: transformers" in (here / "small" / "README.md").read_text()
    assert "tokens/s" not in (here / "small" / "report.html").read_text(encoding="utf-8")

    measured = ("--original", "dense", "--batch", "1", "--batch", "2", "--prompt", "8", "--new", "3", "--rounds", "1")
    code, out, err = layershare("bench", "small", *measured)
    assert code == 0, err
    assert out.count("prefill") == out.count("decode") == 2
    speed = json.loads((here / "small" / "speed.json").read_text())
    assert speed["engine"] == f"transformers {version('transformers')}"
    assert [(rate["phase"], rate["batch"]) for rate in speed["rates"]][2:] == [("prefill", 2), ("decode", 2)]
    assert out.count("first token, ms") == out.count("next token, ms") == 2
    assert 0 < speed["memory"] < speed["original_memory"]
    assert size(speed["memory"]) in out

    code, out, err = layershare("report", "small", "-o", "page.html")
    assert code == 0, err
    assert "tokens/s" in (here / "page.html").read_text(encoding="utf-8")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_measuring_in_vllm_needs_vllm(layershare, here):
    code, _, err = layershare("bench", "dense", "--engine", "vllm")
    assert code == 2
    assert "The engine vllm is not installed: `pip install vllm`" in err
    assert not (here / "dense" / "speed.json").exists()


def test_calibrate_once_run_a_recipe_with_it(layershare, here):
    code, out, _ = layershare(
        "calibrate", "dense", "-o", "stats", "--text", "text.txt", "--blocks", "24", "--length", "64"
    )
    assert code == 0
    assert "stats" in out
    measured = {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")}
    assert len(measured) == 14  # three kinds for each of 4 layers, and two plans
    recipe = "model: dense\nmethod: svd-llm\ncalibration: {text: text.txt, blocks: 24, length: 64, stats: stats}\n"
    (here / "recipe.yaml").write_text(recipe)
    code, _, err = layershare("run", "recipe.yaml", "-o", "small", "--set", "keep=0.7")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")} == measured
    assert "keep: 0.7" in (here / "small" / "recipe.yaml").read_text()


@pytest.mark.filterwarnings("ignore:The text 'text.txt' has")
def test_methods_share_the_statistics_of_a_text_that_is_too_short(layershare, here):
    text = ("--text", "text.txt", "--blocks", "3000", "--length", "64")
    assert layershare("calibrate", "dense", "-o", "stats", *text)[0] == 0
    measured = {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")}
    assert len(measured) == 14
    for method in ("svd-llm", "auto"):
        code, _, err = layershare("compress", "dense", "-o", method, "-m", method, "--stats", "stats", *text)
        assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")} == measured


def test_the_sample_is_not_a_folder_of_that_name(layershare, here):
    (here / "dense").rename(here / "sample")
    code, _, err = layershare("eval", "sample", "--text", "text.txt")
    assert code == 2
    assert "a folder here, too: write ./sample for that" in " ".join(err.split())
    assert layershare("eval", "./sample", "--text", "text.txt", "--length", "32")[0] == 0


def test_a_model_and_its_original_are_measured_in_one_type(layershare, here, monkeypatch):
    AutoModelForCausalLM.from_pretrained("dense", dtype=torch.bfloat16).save_pretrained(here / "half")
    AutoTokenizer.from_pretrained("dense").save_pretrained(here / "half")
    monkeypatch.setattr("layershare.device.multiplies_halves", lambda: True)
    code, out, err = layershare("eval", "half", "--original", "dense", "--text", "text.txt", "--length", "32", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["dtype"], found["kl"]) == ("bfloat16", pytest.approx(0, abs=1e-6))
    code, _, err = layershare("bench", "half", "--original", "dense", "--prompt", "4", "--new", "2", "--rounds", "1")
    assert code == 0, err
    speed = json.loads((here / "half" / "speed.json").read_text())
    assert speed["memory"] == speed["original_memory"]


def test_plans_by_weights_and_by_measured_statistics(layershare, here):
    code, out, err = layershare("plan", "dense", "-m", "welore")
    assert code == 0, err
    assert "welore on llama" in out
    for arguments, missing in (
        (("-m", "d-rank"), "with --stats"),
        (("-m", "asvd", "--stats", "stats"), "runs the model on a text while it plans"),
    ):
        code, out, _ = layershare("plan", "dense", *arguments)
        assert (code, missing in " ".join(out.split()), "of memory" in out) == (0, True, True)
        code, out, err = layershare("plan", "dense", *arguments, "--json")
        assert (code, out, missing in " ".join(err.split())) == (2, "", True)
    measuring = ("calibrate", "dense", "-o", "stats", "--text", "text.txt", "--blocks", "24", "--length", "64")
    code, _, err = layershare(*measuring, "--fisher", "--dtype", "bfloat16")
    assert code == 0, err
    measured = {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")}
    assert len(measured) == 18  # four kinds for each of 4 layers, and two plans
    code, _, err = layershare("plan", "dense", "-m", "d-rank", "--stats", "stats")
    assert (code, "statistics of this model on 0 texts" in err) == (2, True)
    code, out, err = layershare("plan", "dense", "-m", "d-rank", "--stats", "stats", "--dtype", "bfloat16")
    assert code == 0, err
    assert "d-rank on llama" in out
    code, out, err = layershare("plan", "dense", "-m", "auto", "--stats", "stats", "--dtype", "bfloat16")
    assert code == 0, err
    assert "auto on llama" in out
    code, _, err = layershare(*COMPRESS, "-m", "fwsvd", "--stats", "stats", "--dtype", "bfloat16")
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in (here / "stats").rglob("*.safetensors")} == measured


def test_a_plan_by_gradients_that_were_not_measured_is_refused(layershare, here):
    measuring = ("calibrate", "dense", "-o", "stats", "--text", "text.txt", "--blocks", "24", "--length", "64")
    assert layershare(*measuring, "--no-gradients")[0] == 0
    code, _, err = layershare("plan", "dense", "-m", "auto", "--stats", "stats")
    assert (code, "The statistics have no gradients" in err) == (2, True)
    code, out, err = layershare("plan", "dense", "-m", "auto", "-O", "two_sided=false", "--stats", "stats")
    assert code == 0, err
    assert "auto on llama" in out


def spoil_weights(here):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate_proj.weight")[0, 0] = torch.inf
    model.save_pretrained(here / "dense")


def change_config(**values):
    def change(here):
        path = here / "dense" / "config.json"
        write_json(path, json.loads(path.read_text()) | values)

    return change


newer_format = change_config(quantization_config={"quant_method": "layershare", "version": 99, "groups": []})


MISTAKES = {
    "method": (("-m", "basis_share"), None, "Unknown method 'basis_share'. Did you mean 'basis-sharing'?"),
    "option": (("-O", "groupsize=2"), None, "Unknown option of basis-sharing 'groupsize'. Did you mean 'group_size'?"),
    "no options": (("-m", "svd", "-O", "rank=2"), None, "Unknown option of svd 'rank'. Known: multiple, pivot."),
    "option value": (("-O", "group_size=0"), None, "Option 'group_size' of basis-sharing"),
    "role": (("-O", "shared=q,quary"), None, "Unknown role 'quary'."),
    "absent role": (("-O", "shared=[qkv]"), None, "A 'llama' model has no role 'qkv'"),
    "key": (("--set", "calibration.block=3"), None, "Unknown key in calibration 'block'. Did you mean 'blocks'?"),
    "unset section": (("--set", "evaluation.blocks=2", "--length", "4096"), None, "do not fit"),
    "setting": (("-O", "group_size"), None, "'group_size' is not a setting"),
    "yaml": (("--set", "keep=[1"), None, "is not YAML"),
    "shards": (("--set", "max_shard_size=many"), None, "'max_shard_size' in the recipe"),
    "stats": (("--stats", "text.txt"), None, "'text.txt' is a file; name a folder"),
    "text": (("--text", "wikitxt"), None, "Unknown text 'wikitxt'. Did you mean 'wikitext2'?"),
    "text without a name": (("--text", ""), None, "The text has no name"),
    "evaluation text without a name": (("--eval", ""), None, "The text has no name"),
    "text file": (("--text", "texts/a.txt"), None, "There is no text file or folder 'texts/a.txt'"),
    "encoding": (
        (),
        lambda here: (here / "text.txt").write_bytes("Häuser".encode("cp1252")),
        "'text.txt' is not UTF-8 (byte 1); if it comes from Windows, convert it with iconv -f WINDOWS-1252 -t UTF-8.",
    ),
    "short text": (
        ("--set", "calibration.text=short.txt"),
        lambda here: (here / "short.txt").write_text("x"),
        "less than one block of 64",
    ),
    "keep 0": (("--keep", "0"), None, "keep=0 must be above 0 and at most 1"),
    "keep 2": (("--keep", "2"), None, "keep=2 must be above 0 and at most 1"),
    "keep too small": (("--keep", "0.1"), None, "smaller than what cannot be compressed"),
    "nan": ((), spoil_weights, "The weights of 'model.layers.1.mlp.gate_proj.weight' contain NaN or infinity"),
    "config": ((), lambda here: (here / "dense" / "config.json").unlink(), "is not a model: it has no config.json"),
    "weights": ((), lambda here: (here / "dense" / "model.safetensors").unlink(), "dense' has no weights"),
    "output": (
        (),
        lambda here: write_json(here / "small.json", {}) or (here / "small").mkdir() or (here / "small" / "x").touch(),
        "is not empty",
    ),
    "newer": ((), newer_format, "already compressed"),
    "shapes": ((), change_config(intermediate_size=40), "config.json and weights are of different models"),
    "config value": ((), change_config(num_hidden_layers="four"), "its num_hidden_layers is 'four'"),
    "seed": (("--set", f"calibration.seed={2**63}"), None, "'calibration.seed' in the recipe"),
    "file as folder": (("-o", "text.txt/small"), None, "'text.txt' is a file; name a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_exit_code_2_and_nothing_written(mistake, layershare, here):
    arguments, spoil, message = MISTAKES[mistake]
    if spoil is not None:
        spoil(here)
    before = set(here.rglob("*"))
    code, _, err = layershare(*COMPRESS, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert set(here.rglob("*")) == before


def test_mistakes_with_models(layershare, here):
    other = tiny_model("llama")
    other.resize_token_embeddings(170, mean_resizing=False)
    other.save_pretrained(here / "other")
    for arguments, message in {
        ("plan", "sampel"): "Did you mean 'sample'?",
        ("plan", "./nowhere"): "There is no model folder './nowhere'",
        (
            "export",
            "nowhere",
            "-o",
            "out",
            "--to",
            "dense",
        ): "Unknown model 'nowhere'. Did you mean 'other'?",
        ("generate", "nowhere", "x"): "Unknown model 'nowhere'. Did you mean 'other'?",
        ("generate", "hello, world", "dense"): "name the model first, then the prompt",
        ("bench", "nowhere"): "Unknown model 'nowhere'. Did you mean 'other'?",
        ("eval", "nowhere"): "Unknown model 'nowhere'. Did you mean 'other'?",
        ("heal", "nowhere", "-o", "out"): "There is no folder 'nowhere'",
        ("calibrate", "nowhere", "-o", "out"): "Unknown model 'nowhere'. Did you mean 'other'?",
        ("report", "nowhere"): "There is no folder 'nowhere'",
        ("plan", "dense", "--length", "500"): "Blocks of 500 tokens do not fit",
        ("generate", "dense", "x", "--device", "gpu9"): "There is no device 'gpu9'",
        ("eval", "nowhere/at/all"): "There is no model folder",
        ("generate", "text.txt", "x"): "'text.txt' is a file",
        ("generate", "dense", "x", "--dtype", "f16"): "Unknown dtype 'f16'. Did you mean 'float16'?",
        ("generate", "dense", ""): "The prompt has no tokens",
        ("generate", "dense", "x" * 5000): "5000 + 64 tokens do not fit",
        **{(verb, "x" * 5000): "(File name too long); name something else" for verb in ("ls", "report", "verify")},
        ("generate", "dense", "x", "--tokens", "128"): "1 + 128 tokens do not fit: this model takes 128",
        ("plan", "dense", "-o", "no/plan.json"): "There is no folder 'no'",
        ("calibrate", "dense", "-o", "text.txt/stats"): "'text.txt' is a file; name a folder",
        ("calibrate", "dense", "-o", "dense"): "'dense' is the folder of a model",
        ("export", "dense", "-o", "text.txt/wide", "--to", "dense"): "'text.txt' is a file; name a folder",
        ("eval", "dense", "-o", "dense"): "'dense' is a directory",
        ("bench", "dense", "-o", "dense"): "'dense' is a directory",
        ("eval", "dense", "--text", ""): "The text has no name",
        ("eval", "dense", "--tasks", ""): "'evaluation.tasks' in the recipe",
        ("eval", "dense", "--text", "stdlib", "--length", "129"): "Blocks of 129 tokens do not fit",
        ("eval", "dense", "--text", "stdlib", "--length", "1"): "'evaluation.length' in the recipe",
        ("eval", "dense", "--text", "stdlib", "--blocks", "0"): "'evaluation.blocks' in the recipe",
        ("eval", "dense", "--text", "stdlib", "--batch-size", "0"): "'evaluation.batch_size' in the recipe",
        ("eval", "dense", "--tasks", "piqa", "--limit", "0"): "'evaluation.limit' in the recipe",
        ("eval", "dense", "--original", "other"): "The original has another vocabulary (170 tokens, this model 160)",
        ("bench", "dense", "--original", "other"): "The original has another vocabulary (170 tokens, this model 160)",
        ("export", "dense", "-o", "out"): "Missing option '--to'",
        ("export", "dense", "-o", ".", "--to", "dense"): "is not empty",
        ("ls", "nowhere"): "There is no folder 'nowhere'",
        ("bench", "sample"): "'sample' is no folder to put speed.json into; name a file with -o.",
        ("bench", "dense", "--prompt", "500"): "500 + 32 tokens do not fit: this model takes 128",
        ("bench", "dense", "--engine", "vlm"): "Unknown engine 'vlm'. Did you mean 'vllm'?",
        ("bench", "dense", "--engine", "vllm", "--device", "cpu"): "leave --device out",
        ("report", "dense"): "'dense' is no finished run, it has no results.json",
        ("report", "dense", "-o", "no/report.html"): "There is no folder 'no'",
        ("run", "nowhere.yaml", "-o", "out"): "there is no 'nowhere.yaml'",
    }.items():
        code, _, err = layershare(*arguments)
        assert code == 2
        assert message in err, err
        assert "Traceback" not in err


def test_the_list_passes_over_results_of_others(layershare, here):
    for name, content in {"broken": "nope", "other": '{"method": "mine"}', "list": "[1]", "deep": "[" * 10**5}.items():
        (here / name).mkdir()
        (here / name / "results.json").write_text(content)
    (here / "pipe").mkdir()
    os.mkfifo(here / "pipe" / "results.json")
    (here / "around").symlink_to(here)
    code, out, err = layershare("ls", ".")
    assert code == 0, err
    assert not any(name in out for name in ("mine", "broken", "list", "deep", "pipe", "around"))


def test_the_list_names_what_it_cannot_read_and_goes_on(layershare, here):
    make_run(here / "whole")
    keys = {"model": None, "method": 3, "keep": 1, "of": "all", "before": None, "after": {}}
    spoiled = {"[red]null": "null", "empty": "", "deep": "[" * 10**5, "keys": json.dumps(keys), "latin": "{\xff"}
    for name, content in spoiled.items():
        make_run(here / name)
        (here / name / "results.json").write_text(content, encoding="latin-1")
    make_run(here / "pipe")
    (here / "pipe" / "results.json").unlink()
    os.mkfifo(here / "pipe" / "results.json")
    code, out, err = layershare("ls", ".")
    assert code == 0, err
    assert re.search(r"whole +someone/some-model +basis-sharing +800k", out)
    for name in (*spoiled, "pipe"):
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert re.fullmatch(r".*: its results\.json cannot be used \(.+\): delete it, or make the model again\.", line)


def test_the_list_fits_80_columns(here):
    make_run(here / "runs" / "a-long-name-of-a-folder" / "basis-sharing-70", model="meta-llama/Llama-3.1-8B-Instruct")
    table, _ = listing(here)
    lines = "".join(each.text for each in Console(width=80).render(table)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert lines[1].split()[-5:] == ["size", "kept", "on", "disk", "perplexity"]


README = "---\nlicense: other\nlicense_name: its-own\nlicense_link: LICENSE\n---\n"


@pytest.mark.filterwarnings("default:.*nothing was done")
def test_a_result_has_what_belongs_to_its_original_wherever_it_is_used(layershare, here, monkeypatch):
    templates = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer = AutoTokenizer.from_pretrained("dense")
    tokenizer.chat_template = templates
    tokenizer.save_pretrained("dense")
    carried = {"LICENSE": "Mine.", "tokenizer.model": "pieces", "NOTICE.txt": "Note."}
    for name, content in (carried | {"README.md": README, "code.py": "import this"}).items():
        (here / "dense" / name).write_text(content)
    monkeypatch.chdir(here / "dense")
    assert layershare("compress", ".", "-o", "../small", "-m", "svd", "--keep", "0.8")[0] == 0
    code, _, err = layershare("compress", "../dense", "-o", "../small", "-m", "svd", "--keep", "0.8")
    assert (code, "nothing was done" in err) == (0, True)

    (here / "elsewhere" / "dense").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    text = ("--text", "../text.txt", "--length", "16", "--tokens", "64", "--batch-size", "2", "--train", "norms")
    code, _, err = layershare("heal", "../small", "-o", "../healed", "--loss", "both", *text)
    assert code == 0, err
    assert layershare("export", "../healed", "-o", "../wide", "--to", "dense")[0] == 0
    for folder in ("small", "healed", "wide"):
        assert {name: (here / folder / name).read_text() for name in carried} == carried
        assert not (here / folder / "code.py").exists()
        assert AutoTokenizer.from_pretrained(here / folder).chat_template == templates
    for folder in ("small", "healed"):
        card = (here / folder / "README.md").read_text()
        assert "# dense, compressed to 80" in card
        assert str(here) not in card
        assert card.count("license: other\nlicense_name: its-own\nlicense_link: LICENSE\n") == 1
        assert "base_model:" not in card
        assert json.loads((here / folder / "results.json").read_text())["model"] == str(here / "dense")


@pytest.mark.filterwarnings("default:The README.md of")
def test_an_original_s_broken_card_costs_no_finished_work(layershare, here):
    (here / "dense" / "README.md").write_text("---\nlicense: [\n---\n")
    code, _, err = layershare("compress", "dense", "-o", "small", "-m", "svd")
    assert code == 0
    assert "Warning: The README.md of" in err
    assert "library_name: transformers" in (here / "small" / "README.md").read_text()
    assert (here / "small" / "report.html").stat().st_size < 300_000


@pytest.mark.parametrize("content", ["null", "[]", "{", "[" * 10**5], ids=lambda content: content[:5])
def test_healing_refuses_damaged_results_before_it_trains(content, layershare, here):
    (here / "dense" / "results.json").write_text(content)
    code, _, err = layershare("heal", "dense", "-o", "healed", "--text", "text.txt", "--length", "16")
    assert code == 2
    assert "Traceback" not in err
    assert re.search(r"Error: The results.json of '.*' cannot be used \(.*\): delete it, or compress", err)
    assert not (here / "healed").exists()


def test_a_checkpoint_from_a_newer_version_says_so(layershare, here):
    newer_format(here)
    code, _, err = layershare("generate", "dense", "x")
    assert code == 2
    assert "update it (`pip install .` in a checkout of layershare)" in err
