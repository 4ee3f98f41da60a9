"""What bytes buy on the sample model: fewer bits, fewer parameters, or both. Writes results.json beside this file.

The dense model and `auto` at two sizes, each at 16, 8 and 4 bits a number, by GPTQ. Quality is the rise of the log of
perplexity on held-out text; bytes are those of the matrices in the blocks. Ten minutes on one slow core.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import layershare
from layershare.model.hub import load
from layershare.model.source import read_tokenizer
from layershare.report.results import environment

MODEL, TEXT, LENGTH = "sample", "stdlib", 256
BLOCKS, TESTED = 16, 12
KEEPS = (1.0, 0.8, 0.5)
BITS = (16, 8, 4)


def main() -> None:
    """Measure everything."""
    torch.set_num_threads(1)
    original, tokenizer = load(MODEL, dtype=torch.float32), read_tokenizer(MODEL)
    text: dict[str, Any] = {"text": TEXT, "blocks": BLOCKS, "length": LENGTH}
    rows, tested = [], None
    with TemporaryDirectory() as temporary:
        for keep in KEEPS:
            folder = Path(temporary) / f"{keep}"
            if keep < 1:
                model = load(MODEL)
                layershare.compress(model, tokenizer, method="auto", keep=keep, of="targets", folder=folder, **text)
            for bits in BITS:
                place = folder if keep < 1 else MODEL
                done = None
                if bits < 16:
                    out = Path(temporary) / f"{keep}-{bits}"
                    layershare.quantize(place, out, bits=bits, **text)
                    done, place = json.loads((out / "results.json").read_text())["quantization"], out
                small = load(place, dtype=torch.float32)
                found = layershare.measure(small, tokenizer, text=TEXT, blocks=TESTED, length=LENGTH, original=original)
                tested = found.text
                rows.append(
                    {
                        "keep": keep,
                        "bits": bits,
                        "bytes": done["after"] if done else None,
                        "perplexity": found.perplexity.value,
                        "original_perplexity": found.original_perplexity and found.original_perplexity.value,
                        "kl": found.kl,
                    }
                )
                if done:  # of the model that it was made from
                    rows[-(1 + BITS.index(bits))]["bytes"] = done["before"]
                print(json.dumps(rows[-1]), flush=True)
    assert tested is not None
    results = {"model": MODEL, "group": 64, "text": tested, "calibration": text, "rows": rows, **environment()}
    Path(__file__).with_name("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
