"""One quantization: a finished folder in, another one out, whose matrices are stored in few bits."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from layershare.calibrate.text import Source
from layershare.device import device_of
from layershare.disk import require_disk
from layershare.errors import LayershareError
from layershare.folders import QUANTIZE, copy_records, has_records, require_new, staged, was_compressed
from layershare.foreign import write_yaml
from layershare.job import load_calibration
from layershare.model.arch import find_blocks
from layershare.model.checked import exact_dtype, quantized_by
from layershare.model.composition import Storage
from layershare.model.describe import describe, role_of
from layershare.model.hub import QUANT_METHOD, LayershareConfig, adopt, load, store_as, write_folder
from layershare.model.original import copy_side_files, files_of, located
from layershare.model.source import read_config, read_tokenizer, resolve, stored_types, values_of
from layershare.progress import Announce, Clock, silent
from layershare.recipe import Calibration
from layershare.report.page import write_pages
from layershare.report.results import RESULTS, CalibrationText, Environment, Quantized, results_of
from layershare.solve.quantize import quantize_factors
from layershare.store import as_json, write_atomically, write_json
from layershare.values import Scheme

_STALE = ("evaluation", "samples", "held_out")
"""What `results.json` tells of the weights before they were quantized."""


def quantize_folder(
    folder: str | Path,
    out: str | Path,
    *,
    bits: int = 4,
    group: int | None = None,
    basis_bits: int | None = None,
    scheme: Scheme = "int",
    calibration: Calibration | None = None,
    text: Source | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    announce: Announce = silent,
) -> Quantized:
    """Quantize the model in a folder (or of a hub id) into the new folder `out`; returns what `results.json` tells.

    `bits` of all matrices of its blocks, `basis_bits` of bases (`None`: the same), with a scale for each `group` of
    numbers along the input (`None`: 64, or as many as the `scheme` has). `calibration`: the text for GPTQ, in whose
    place `text` may be given; `None` rounds. Raises `LayershareError` for bad input, before anything is written: no
    finished model, one that is quantized already or sliced, schemes and numbers of bits that do not exist.
    """
    folder, out, place = str(folder), Path(out), device_of(device)
    require_new(out)
    storage, shared = Storage.pair(bits, basis_bits, group, scheme)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    edits = _edits_of(folder, **trust)
    config, tokenizer = read_config(folder, **trust), read_tokenizer(folder, **trust)
    blocks = None if calibration is None else load_calibration(calibration, tokenizer, config, text)
    source = resolve(folder)
    stored, dtype = stored_types(source, config)
    before = results_of(Path(source)) if has_records(Path(source)) else {}
    clock = Clock(announce)

    # Half precision multiplies slowly on many CPUs, and the text's Grams want better.
    run_in = exact_dtype(stored, dtype if blocks is None else torch.float32)
    model = load(folder, dtype=run_in, device_map=place, **trust)
    matrices = _bytes_of_matrices(model, dtype)
    with clock.step("quantize") as progress, TemporaryDirectory(prefix="layershare-") as scratch:
        compositions, errors = quantize_factors(
            model,
            edits.compositions,
            lambda composition: composition.stored_as(storage, shared),
            dtype,
            tokens=None if blocks is None else blocks.tokens,
            batch_size=Calibration.batch_size if calibration is None else calibration.batch_size,
            progress=progress,
            scratch=Path(scratch),
        )
    store_as(model, stored, dtype)
    notes = {"model": located(folder), **edits.compression, "bits": bits}
    adopt(model, LayershareConfig(**{**edits.to_dict(), "compositions": compositions, "compression": notes}))
    seed = Calibration.seed if calibration is None else calibration.seed
    done = Quantized(
        model=located(folder),
        bits=bits,
        basis_bits=shared.bits,
        group=storage.group,
        scheme=scheme,
        text=None if blocks is None else CalibrationText(**blocks.identity, seed=seed),
        before=matrices,
        after=_bytes_of_matrices(model, dtype),
        error=sum(errors.values()) / len(errors),
        seconds=clock.seconds["quantize"],
        **vars(Environment.here()),
    )
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    require_disk({out: needed})
    with staged(out, needed, new=True) as staging:
        write_folder(model, staging, tokenizer)
        if (files := files_of(folder)) is not None:
            copy_side_files(files, staging)
            copy_records(files, staging)
        how = {"bits": bits, "group": storage.group, "basis_bits": shared.bits, "scheme": scheme}
        how |= {"model": done.model, "calibration": None if calibration is None else asdict(calibration)}
        write_atomically(staging / QUANTIZE, write_yaml(how).encode())
        write_json(staging / RESULTS, _results(before, done, staging))
        if was_compressed(staging):
            write_pages(staging, out.absolute().name)
    return done


def _edits_of(folder: str, *, trust_remote_code: bool) -> LayershareConfig:
    """What was done to a model before. Raises `LayershareError` for what cannot be quantized."""
    values = values_of(resolve(folder))
    if quantized_by(folder, values) != QUANT_METHOD:
        describe(read_config(folder, trust_remote_code=trust_remote_code))  # raises for kinds of models not supported
        return LayershareConfig()
    edits = LayershareConfig(**values["quantization_config"])
    if edits.slice is not None:
        raise LayershareError(f"'{folder}' is sliced, and its shortcuts cannot be quantized: give another model.")
    if any(factor.storage for each in edits.compositions for factor in each.factors):
        raise LayershareError(f"'{folder}' is quantized already: give the model that it was made from.")
    return edits


def _bytes_of_matrices(model: Any, dtype: torch.dtype) -> int:
    """The bytes of all matrices in the blocks as they are stored, their floats in this dtype; without biases."""
    stack, _ = find_blocks(model)
    total = 0
    for name, module in model.base_model.named_modules():
        if name.startswith(f"{stack}.") and role_of(name) is not None:
            for key, tensor in module.state_dict().items():
                size = dtype.itemsize if tensor.is_floating_point() else tensor.itemsize
                total += 0 if key == "bias" else tensor.numel() * size
    return total


def _results(before: dict[str, Any], done: Quantized, folder: Path) -> dict[str, Any]:
    """What was known of the model, without what held before, with the new sizes in bytes."""
    results = {key: value for key, value in before.items() if key not in _STALE}
    if "healing" in results:
        results["healing"] = {key: value for key, value in results["healing"].items() if key != "evaluation"}
    if "after" in results:
        sizes: dict[str, Any] = results["after"]
        whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        results["after"] = {
            "all": {**sizes["all"], "bytes": whole},
            "targets": {**sizes["targets"], "bytes": done.after},
        }
    return {"model": done.model, **results, "quantization": as_json(done)}
