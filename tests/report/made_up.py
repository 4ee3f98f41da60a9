"""Runs with made-up numbers, as their folders would hold them: every kind of edit, without a model."""

import json
from pathlib import Path
from typing import Any

import yaml

from layershare.plan.edits import Place, Share
from layershare.report.results import environment

ROLES = {"q": (16, 16), "k": (16, 8), "o": (16, 16), "up": (16, 24), "down": (24, 16)}
LAYERS = 6
SHARED = [
    {"kind": "share", "places": [["q", 0], ["q", 2]], "rank": 6, "side": "input"},
    {"kind": "share", "places": [["q", 1], ["q", 3]], "rank": 5, "side": "input"},
    {"kind": "share", "places": [["down", 4]], "rank": 3, "side": "output"},
]
OTHER = [
    {"kind": "drop", "part": "attention", "layers": [1]},
    {"kind": "drop", "part": "block", "layers": [2]},
    {"kind": "merge", "into": 3, "layers": [3, 4], "coefficients": [0.5, 0.5]},
]

DELTAS = [
    {"kind": "delta", "role": "up", "anchor": 1, "layers": [2, 4], "rank": 2},
    {"kind": "delta", "role": "down", "anchor": 1, "layers": [1, 2], "rank": 3},
]


def make_run(
    folder: Path,
    *,
    edits: list[dict[str, Any]] = SHARED,
    keep: float = 0.8,
    perplexity: float | None = 12.0,
    model: str = "someone/some-model",
    method: str = "basis-sharing",
    tokens: str = "abc",
    tasks: bool = False,
    original: dict[str, str] | None = None,
) -> Path:
    """Write the files of a finished run that a page reads."""
    folder.mkdir(parents=True)
    size = {"parameters": 1_000_000, "bytes": 2_000_000, "multiplications": 900_000}
    after = {key: int(keep * value) for key, value in size.items()}
    text = {"bos": True, "text_sha256": "abc", "tokens_sha256": tokens}
    results: dict[str, Any] = {
        "model": model,
        "original": original or {},
        "model_fingerprint": model,
        "method": method,
        "options": {"group_size": 2, "shared": ["q"], "refit": None},
        "keep": keep,
        "of": "all",
        "before": {"all": size, "targets": size},
        "after": {"all": after, "targets": after},
        "calibration": {**text, "source": "<books> & more", "blocks": 4, "length": 32, "seed": 1},
        "ridge": 1e-3,
        "refit": False,
        "refit_ridge": 1e-6,
        "refine": None,
        "distill": None,
        "groups": {
            Share(tuple(Place(*place) for place in edit["places"]), edit["rank"], edit["side"]).id: {
                "error": 0.01 * edit["rank"],
                "rank": edit["rank"],
                "parameters": edit["rank"] * 40,
                "spectrum": {"index": [1, 4, edit["rank"], 16], "share": [0.6, 0.1, 0.02, 0.0]},
            }
            for edit in edits
            if edit["kind"] == "share"
        },
        "shapes": {role: [list(shape)] * LAYERS for role, shape in ROLES.items()},
        "seconds": {"solve": 70.0, "evaluate": 5.0},
        **environment(),
    }
    if perplexity is not None:
        value = {"value": perplexity, "nll": 2.5, "tokens": 100}
        results["evaluation"] = {
            "text": {**text, "source": "stdlib", "blocks": 2, "length": 16},
            "dtype": "float32",
            "perplexity": value,
            "original_perplexity": value | {"value": 10.0},
            "kl": (perplexity - 10) / 10,
            "top1_agreement": 0.9,
        }
        results["samples"] = [{"prompt": "<b>if</b>", "original": "x = 1", "model": "</script><i>y"}]
    if tasks:
        guessed = {"value": 0.25, "stderr": 0.02, "near_chance": True}
        results.setdefault("evaluation", {})["tasks"] = {"arc_easy": {"rows": 400, "scores": {"acc": guessed}}}
        better = {"value": 0.5, "stderr": 0.025, "near_chance": False}
        results["evaluation"]["original_tasks"] = {"arc_easy": {"rows": 400, "scores": {"acc": better}}}
    plan = {"model_type": "llama", "method": method, "options": {}, "keep": keep, "of": "all", "edits": edits}
    plan |= {when: results[when] for when in ("before", "after")}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "keep": keep}))
    (folder / "config.json").write_text("{}")
    return folder
