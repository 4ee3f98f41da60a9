"""Tables of the trainings, for docs/results.md."""

import json
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.methods.tables import machine, markdown, require_same
from benchmarks.results import Results

Values = dict[str, Any]
UNMEASURED = "Not measured yet; `python -m benchmarks.heal.run` does it."


def read(every: Results, model: str) -> tuple[dict[str, Values], Values]:
    """Results of one model by COMPRESSION/compressed or COMPRESSION/HEALING-SEED, and those of the original.

    Raises `ValueError` if they are not comparable: of different weights, trained or measured on different texts.
    """
    found = {name.partition("/")[2]: each for name, each in every.read().items() if name.startswith(f"{model}/")}
    original = found.pop("original")
    require_same(
        model,
        "benchmarks.heal.run",
        {
            "weights": {each["model_fingerprint"] for each in found.values()},
            "training texts": {each["text"]["text_sha256"] for each in found.values() if "text" in each},
            "blocks": {each["text"]["tokens_sha256"] for key, each in found.items() if key.endswith("-0")}
            | {original["text"]["tokens_sha256"]},
            "amounts of training": {each["tokens"] for each in found.values() if "tokens" in each},
            "test texts": {measured(each)["text"]["tokens_sha256"] for each in found.values()},
        },
    )
    return found, original


def measured(result: Values) -> Values:
    """What was measured at the end of an experiment."""
    evaluation = result["evaluation"]
    return evaluation.get("after", evaluation)


def heal_page(every: Results, model: str) -> str:
    """The tables of one model, and what they were made with."""
    if f"{model}/original" not in every.read():
        return UNMEASURED
    results, original = read(every, model)
    trained = [each for each in results.values() if "tokens" in each]
    if not trained:
        return UNMEASURED
    first = measured(trained[0])
    text = first["text"]
    title = (
        f"Original: perplexity {first['original_perplexity']['value']:.2f} on {text['source']}, "
        f"{text['blocks']} blocks of {text['length']} tokens. Every training saw {trained[0]['tokens']:,} tokens of "
        f"{trained[0]['text']['source']}."
    )
    held_out = (
        f"The same on {original['text']['held_out']} blocks of the training's text that no training sees (original: "
        f"{original['held_out_perplexity']:.2f}; in bfloat16, as training goes)"
    )
    perplexities = {key: measured(each)["perplexity"]["value"] for key, each in results.items()}
    tables = [
        _against(results),
        _replacement(results),
        _recovered(TESTED, first["original_perplexity"]["value"], perplexities.get),
        _recovered(held_out, original["held_out_perplexity"], partial(_held_out, results)),
        _ablation(results),
    ]
    return "\n\n".join([title, *(table for table in tables if table), machine(trained[-1])])


def speed_page(file: Path) -> str:
    """Speed and memory of training dense and compressed models of one shape."""
    results = json.loads(file.read_text(encoding="utf-8"))
    setting = results["setting"]
    rows = [
        [
            name,
            f"{each['parameters'] / 1e6:,.0f} M",
            f"{each['trained'] / 1e6:,.0f} M",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['peak_memory'] / 1e9:.1f} GB",
            f"{each['expected_memory'] / 1e9:.1f} GB",
        ]
        for name, each in results["trainings"].items()
    ]
    header = [setting["shape"], "parameters", "trained", "tokens per second", "peak memory", "expected"]
    note = f"{setting['rows']} blocks of {setting['length']} tokens per step, {setting['steps']} steps"
    accelerator = results["machine"]["accelerators"][0]
    return f"{markdown(header, rows)}\n\n{note}; {accelerator}, {machine(results)}"


def _cells(result: Values | None) -> list[str]:
    """Perplexity and KL of a result, blanks if there is none."""
    if result is None:
        return ["", ""]
    return [f"{measured(result)['perplexity']['value']:.2f}", f"{measured(result)['kl']:.3f}"]


def _kept(result: Values) -> str:
    return f"{result['after']['all']['parameters'] / result['before']['all']['parameters']:.1%}"


def _against(results: dict[str, Values]) -> str:
    """DeltaLLM against the others at equal size."""
    rows = []
    for removed in ("12", "24"):
        for method in ("delta", "shortgpt", "laco", "joint-drop", "slicegpt", "basis-sharing"):
            name = f"{method}-{removed}"
            bare = results.get(f"{name}/compressed")
            if bare is None:
                continue
            for healing in ("replacement", "lora", "factors"):
                healed = results.get(f"{name}/{healing}-0")
                if healed is not None:
                    rows.append(
                        [f"{method}, {removed} % removed", _kept(bare), *_cells(bare), healing, *_cells(healed)]
                    )
    header = ["", "kept", "compressed", "KL", "trained", "healed", "KL"]
    return f"DeltaLLM against the methods of its paper, and Basis Sharing:\n\n{markdown(header, rows)}" if rows else ""


def _replacement(results: dict[str, Values]) -> str:
    """Progressive replacement against plain losses, over seeds."""
    rows = []
    for healing in ("replacement", "distillation", "cross-entropy"):
        found = [value for key, value in results.items() if key.startswith(f"delta-12/{healing}-")]
        if len(found) < 2:
            return ""
        perplexities = [measured(each)["perplexity"]["value"] for each in found]
        divergences = [measured(each)["kl"] for each in found]
        agreements = [measured(each)["top1_agreement"] for each in found]
        rows.append(
            [
                healing,
                f"{mean(perplexities):.2f} ± {stdev(perplexities):.2f}",
                f"{mean(divergences):.4f} ± {stdev(divergences):.4f}",
                f"{mean(agreements):.1%}",
                str(len(found)),
            ]
        )
    header = ["delta, 12 % removed", "perplexity", "KL", "top-1", "seeds"]
    return f"The same steps with three losses (mean ± standard deviation):\n\n{markdown(header, rows)}"


WAYS = ("/compressed", "/lora-0", "/factors-0", "/full-0", "-refined/compressed", "-refined/factors-0")
RECOVERED = ["basis-sharing", "compressed", "LoRA", "factors, distilled", "full", "pre-fit", "pre-fit, then factors"]
TESTED = (
    "Perplexity after each training, in brackets how much of the lost log-perplexity came back. "
    "The pre-fit is part of compressing (`--effort blocks`) and sees the calibration text only"
)


def _recovered(note: str, original: float, perplexity: Callable[[str], float | None]) -> str:
    """Basis Sharing healed in several ways, with the part of the lost log-perplexity that came back."""
    rows = []
    for removed in (20, 30, 40, 50):
        perplexities = [perplexity(f"basis-sharing-t{removed}{way}") for way in WAYS]
        if perplexities[0] is not None:
            rows.append([f"{removed} % of targets removed", *_parts(original, perplexities[0], perplexities[1:])])
    return f"{note}:\n\n{markdown(RECOVERED, rows)}" if rows else ""


def _held_out(results: dict[str, Values], key: str) -> float | None:
    """Perplexity on the blocks held out, at the end of a training; of a compressed model, before its factors train."""
    compression, what = key.split("/")
    training = results.get(f"{compression}/factors-0" if what == "compressed" else key)
    if training is None:
        return None
    values = [each["held_out_perplexity"] for each in training["log"] if "held_out_perplexity" in each]
    return values[0 if what == "compressed" else -1]


def _parts(original: float, compressed: float, healed: list[float | None]) -> list[str]:
    """Perplexities, the healed ones with the part of the loss that came back; blanks for those not measured."""
    lost = log(compressed / original)
    parts = ["" if each is None else f"{each:.2f} ({log(compressed / each) / lost:.0%})" for each in healed]
    return [f"{compressed:.2f}", *parts]


def _ablation(results: dict[str, Values]) -> str:
    """What each part of the delta's initialisation does, before and after training."""
    rows = []
    for suffix, what in (
        ("", "aligned, activation-weighted, from the SVD"),
        ("-unaligned", "not aligned"),
        ("-euclidean", "Euclidean"),
        ("-random", "random deltas"),
        ("-mean", "mean of the blocks as anchor"),
        ("-refined", "with block-wise pre-fit"),
    ):
        bare = results.get(f"delta-12{suffix}/compressed")
        if bare is not None:
            healed = results.get(f"delta-12{suffix}/replacement-0")
            rows.append([what, _kept(bare), *_cells(bare), *_cells(healed)])
    header = ["delta, 12 % removed", "kept", "compressed", "KL", "healed", "KL"]
    return f"What the parts of the delta's initialisation do:\n\n{markdown(header, rows)}" if rows else ""
