"""The model card of a run: the `README.md` of its folder, with the front matter that the hub reads.

It holds nothing that differs between two runs of one recipe, no dates, durations or folders.
"""

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from layershare.errors import how_to_install
from layershare.methods import METHODS
from layershare.methods.catalogue import paper_of
from layershare.report.runs import Run
from layershare.report.words import (
    blocks,
    calibration,
    compared,
    edits,
    healed,
    healing,
    in_blocks,
    loading,
    options,
    perplexities,
    quantized,
    scores,
    sizes,
    story,
)
from layershare.units import percent

_CARD = """\
---
{front}
---

# {model}, compressed to {kept}

{story}.

Made by layershare {layershare} with the method `{method}`{options}: {edits}. Compressed for the text: {calibration}.
`recipe.yaml` has every setting, `results.json` every measurement, `plan.json` what was done to each matrix.
{quantized}
## Size and quality

| | original | this model | |
| --- | ---: | ---: | ---: |
{table}

{measured}
{healing}
## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{loading}

## Limits

- It is the original with an approximation in it: whatever holds of {base} (licence, training data, bias, what it must
  not be used for) holds here too, and what it knew may be lost where no measurement looked.
- Only what stands in the table was measured. Other languages, other kinds of text and downstream tasks may have lost
  more; measure yours with `layershare eval`.
- Fewer parameters are not the same as faster; `layershare bench` measures speed on your machine.

## Citation

{citation}
"""

_HEALING = """
## Healing

{story}. `heal.yaml` has every setting.

| | before | after |
| --- | ---: | ---: |
{table}
"""


def card(run: Run) -> str:
    """The card as Markdown."""
    named = run.results.original.get("base_model") == run.results.model
    base = f"[{run.model}](https://huggingface.co/{run.model})" if named else f"`{run.model}`"
    rows = [f"| {name} | {old} | {new} | {percent(kept, 1)} |" for name, old, new, kept in sizes(run)]
    measured = "No quality was measured: the recipe has no evaluation."
    if run.results.quantization is not None:
        measured = "No quality was measured since it was quantized; `layershare eval` does."
    if (evaluation := run.evaluation) is not None and (text := evaluation.text) is not None:
        ours, theirs = perplexities(run)
        rows += [
            f"| perplexity {in_blocks(text)} | {theirs:.4g} | {ours:.4g} | {ours / theirs - 1:+.1%} |",
            f"| KL divergence from the original (nats per token) | 0 | {evaluation.kl:.3g} | |",
            f"| top-1 agreement with the original | {percent(1)} | {percent(evaluation.top1_agreement or 0.0, 1)} | |",
        ]
        measured = (
            f"Measured on {blocks(text)}, {evaluation.dtype}. Perplexity is exp of the mean negative "
            "log-likelihood of all\npredicted tokens of blocks that do not overlap; KL divergence and agreement are "
            f"taken at the same positions. SHA-256 of the tokens:\n`{text.tokens_sha256}`."
        )
    if run.tasks:
        rows += [f"| {name} (zero-shot) | {theirs} | {ours} | |" for name, theirs, ours in scores(run)]
        measured = "" if run.evaluation is None else f"{measured}\n\n"
        measured += "Zero-shot scores are lm-eval's, ± standard errors; `results.json` has rows, versions and hashes."
    if run.results.held_out is not None:
        measured += f"\n\n{compared(run.results.held_out)}."
    return _CARD.format(
        front=_front_matter(run).to_yaml(),
        model=run.model,
        kept=percent(run.kept),
        story=story(run),
        layershare=run.results.versions["layershare"],
        method=run.results.method,
        options=f" ({options(run)})" if options(run) else "",
        edits=edits(run),
        calibration=calibration(run),
        quantized=f"\n{quantized(run)}. `quantize.yaml` has every setting.\n" if run.results.quantization else "",
        table="\n".join(rows),
        measured=measured,
        healing=_healing(run),
        base=base,
        loading=loading(run) if run.ordinary else f"{loading(run)} To install it: {how_to_install()}.",
        citation=citation(run.results.method),
    )


def _healing(run: Run) -> str:
    """The section about training, of a model that was trained."""
    if run.healing is None:
        return ""
    rows = [f"| {name} | {before} | {after} |" for name, before, after in healed(run)]
    return _HEALING.format(story=healing(run), table="\n".join(rows))


def citation(method: str) -> str:
    """The paper that the method's own file names, if it names one."""
    paper = paper_of(method) if method in METHODS else None
    return f"{paper}." if paper else f"The method `{method}` of layershare."


def _front_matter(run: Run) -> ModelCardData:
    """What the hub reads; of the original what was known of it when it was compressed."""
    original: dict[str, Any] = dict(run.results.original)
    results = []
    text = run.evaluation and run.evaluation.text
    if text is not None and math.isfinite(perplexity := perplexities(run)[0]):
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=text.source,
                dataset_name=blocks(text),
                metric_type="perplexity",
                metric_value=round(perplexity, 4),
            )
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model_relation="quantized" if "base_model" in original else None,  # the hub's word for compressed versions
        tags=["layershare", "compressed", run.results.method],
        model_name=f"{run.model} at {percent(run.kept)}" if results else None,
        eval_results=results or None,
        **original,
    )
