"""The model card of the sample model, from the facts that `train_sample.py` writes to `training.json`."""

import hashlib
from typing import Any

from torch import Tensor

from layershare.calibrate.stdlib import HELD_OUT

TEMPLATE = """\
---
license: apache-2.0
language: code
library_name: transformers
tags: [python]
---

# layershare sample model

A small Llama that writes something like Python, so that the demo and the tests of `layershare` need no download. It is
made for trying out compression, not for use: it knows nothing but the Python standard library's source.

- {parameters:,} parameters in bfloat16: 10 layers, width 256, feed-forward width 512, 4 heads (all with their own keys
  and values), tied embeddings, context 1024 (trained on 512)
- Tokenizer: its own byte-level BPE of 4096 tokens; adds no token by itself; `<|endoftext|>` ends a document

## Result

**Held-out perplexity {held_out_perplexity:.2f}** per token: blocks of 512 tokens without overlap of the held-out
documents, each tokenised separately and followed by `<|endoftext|>`, joined; 511 predictions per block; the stored
bfloat16 weights computed in float32.

## Text

The standard library's source as `layershare.calibrate.stdlib.documents` gives it, without tests and data tables.
Held out by name: {modules}.
The hash is that of the documents joined with `<|endoftext|>`, in UTF-8.

| split | documents | characters | tokens | SHA-256 |
|---|---|---|---|---|
{splits}

## Training

    torchrun --nproc-per-node 2 scripts/train_sample.py {schedule} -o src/layershare/sample

AdamW (peak learning rate {options[lr]}, weight decay 0.1, betas 0.9 and 0.95), 100 updates of warm-up, cosine to a
hundredth of the peak, gradients clipped to norm 1, {batch:,} tokens per update, bfloat16 autocast.
Seed {options[seed]}, {options[processes]} processes, {steps:,} updates, {tokens_seen:,} tokens ({epochs:.1f} epochs),
{tokens_per_second:,} tokens/s. {machine}; {words}.{earlier}

| update | million tokens | minutes | training loss | held-out perplexity |
|---|---|---|---|---|
{points}

The training loss is the mean since the row above; the held-out perplexities of this table are those of the weights in
training (bfloat16 autocast). With `--minutes` the number of updates depends on the machine's speed, so another run
gives another model.
"""


def describe_text(texts: list[str], tokens: list[Tensor], end: str) -> dict[str, int | str]:
    """Sizes of one split and the hash of its documents joined with the end-of-document token."""
    return {
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "tokens": sum(map(len, tokens)),
        "sha256": hashlib.sha256(end.join(texts).encode()).hexdigest(),
    }


def card(facts: dict[str, Any]) -> str:
    """The model card: TEMPLATE filled with what `training.json` holds."""
    text, curve = facts["text"], facts["curve"]
    points = "\n".join(
        f"| {p['step']} | {p['tokens'] / 1e6:.1f} | {p['seconds'] / 60:.0f} | {p['train_loss']:.3f} "
        f"| {p['held_out_perplexity']:.2f} |"
        for p in curve
    )
    splits = "\n".join(
        f"| {name} | {t['documents']} | {t['characters']:,} | {t['tokens']:,} | `{t['sha256']}` |"
        for name, t in text.items()
    )
    return TEMPLATE.format(
        **facts,
        splits=splits,
        earlier="".join(
            f" Up to update {part['until_step']:,} the schedule was `{part['schedule']}`."
            for part in facts["earlier_schedules"]
        ),
        points=points,
        batch=facts["tokens_seen"] // facts["steps"],
        epochs=facts["tokens_seen"] / text["train"]["tokens"],
        words=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        modules=", ".join(f"`{name}`" for name in HELD_OUT),
    )
