"""One export: a model's folder in, another one out that other programs load."""

# The formats' packages are extras.
# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from layershare.bars import alone
from layershare.disk import require_disk
from layershare.errors import LayershareError, how_to_install, short, unknown
from layershare.folders import require_new, staged
from layershare.model.checked import exact_dtype
from layershare.model.hub import load, store_as
from layershare.model.layers import QuantizedLinear
from layershare.model.original import copy_side_files, files_of
from layershare.model.source import read_config, read_tokenizer, resolve, stored_types
from layershare.model.weights import require_finite
from layershare.progress import Announce, silent

NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime", "transformers.exporters.metadata"),
    "openvino": ("openvino", "transformers.exporters.metadata"),
}
"""What each format needs, whose extra has its name. The last is in transformers since 5.23."""
TARGETS = ("dense", *NEEDED)
TOLERANCE = 1e-3
"""By how much the logits of a graph may differ from the model's, for each unit of the largest of these."""

Inputs: TypeAlias = dict[str, torch.Tensor]


def export(
    folder: str | Path, out: str | Path, *, to: str, trust_remote_code: bool = False, announce: Announce = silent
) -> None:
    """Write the model of a folder or hub id, compressed or not, for other programs to the new folder `out`, which
    appears whole or not at all.

    `to="dense"`: an ordinary checkpoint, the factors multiplied out. It has the original's size again, but for blocks
    that are gone. `to="onnx"` and `to="openvino"`: a graph in float32 as small as the model, with what layers share in
    it once. It takes `input_ids`, `attention_mask` and `position_ids` in any number and length, and the keys and
    values of earlier tokens (OpenVINO's keeps these itself). It is run, and compared with the model, before it appears.

    Raises `LayershareError` for a target that does not exist or whose extra is missing, if there is no model in
    `folder`, one with NaN or infinity, or something in `out`, and for models that cannot be exported.
    """
    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    folder, out = str(folder), Path(out)
    require_new(out)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    tokenizer = read_tokenizer(folder, **trust)
    if to == "dense":
        stored, dtype = stored_types(resolve(folder), read_config(folder, **trust))
        model = load(folder, dense=True, dtype=exact_dtype(stored, dtype), **trust)
        store_as(model, stored, dtype)
    else:
        _require_packages(to)
        # Half precision is slow on many CPUs, and rounds otherwise in every program.
        model = _in_floats(load(folder, dtype=torch.float32, **trust)).eval()
    files = files_of(folder)
    require_finite(model.named_parameters())
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    require_disk({out: needed})
    exported: Any = model if to == "dense" else _graph(model, folder, to, announce)
    with staged(out, needed, new=True) as staging:
        exported.save_pretrained(staging)
        if to != "dense":
            announce("check")
            _require_same(model, staging, folder, to)
        tokenizer.save_pretrained(staging)
        if files is not None:
            copy_side_files(files, staging)


def _require_packages(to: str) -> None:
    """Raise `LayershareError` if what exports to a format, or runs it, is not installed or too old."""
    try:
        for package in NEEDED[to]:
            import_module(package)
    except ImportError as error:
        packages = ", ".join((*NEEDED[to][:-1], "transformers 5.23 or newer"))
        raise LayershareError(f"To export to {to}, have {packages}: {how_to_install(to)}.") from error


def _in_floats(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its matrices of integers as floats: in a graph, each would be made anew in every call."""
    for module in [*model.modules()]:
        for name, part in [*module.named_children()]:
            if isinstance(part, QuantizedLinear):
                plain = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(part.weight, requires_grad=False)
                setattr(module, name, plain)
    return model


def _graph(model: PreTrainedModel, folder: str, to: str, announce: Announce) -> Any:
    """The model as a graph, transformers' `ExportedModel`."""
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    announce("export")
    cache = DynamicCache()  # one without the config keeps all keys and values, of sliding windows, too
    earlier, call = _calls(model, rows=2, lengths=(3, 2))
    with torch.no_grad():
        model(**earlier, past_key_values=cache, use_cache=True)
    inputs: dict[str, Any] = {**call, "past_key_values": cache, "use_cache": True}
    # Rows and length change from call to call, of keys and values `[rows, heads, length, width]`, too.
    shapes: dict[str, Any] = {name: _free(tensor, 0, 1) for name, tensor in call.items()}
    shapes["past_key_values"] = [_free(each, 0, 2) for layer in cache for each in layer[:2]]
    with alone():
        try:
            exporter = OnnxExporter() if to == "onnx" else OpenVINOExporter()
            exported = exporter.export(model, inputs, {"dynamic_shapes": shapes})
            if to == "onnx":
                _keep_once(exported.program)
        except Exception as error:  # of torch, transformers or the format's own packages
            why = short(" ".join(str(error).split()))
            raise LayershareError(f"'{folder}' cannot be exported to {to} ({why}): use --to dense.") from error
    exported.config = deepcopy(model.config)
    vars(exported.config).pop("quantization_config", None)  # there are no factors to be loaded
    exported.generation_config = model.generation_config
    return exported


def _keep_once(program: Any) -> None:
    """Store equal tensors of an ONNX graph once, and not where in whose files its nodes come from."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, DeduplicateInitializersPass

    DeduplicateInitializersPass(size_limit=2**62)(program)
    ClearMetadataAndDocStringPass()(program)


def _free(tensor: torch.Tensor | None, *dims: int) -> dict[int, Any] | None:
    """Which dimensions of an input are not fixed, as `torch.export` takes it."""
    return None if tensor is None else dict.fromkeys(dims, torch.export.Dim.AUTO)


def _calls(model: PreTrainedModel, *, rows: int, lengths: tuple[int, ...], padding: int = 0) -> Iterator[Inputs]:
    """The inputs of calls that read a random text piece by piece, its first row padded on the left."""
    taken = inspect.signature(model.forward).parameters
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (rows, sum(lengths)), generator=drawn)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    start = 0
    for length in lengths:
        end = start + length
        call = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end]}
        yield call | {"position_ids": positions[:, start:end]} if "position_ids" in taken else call
        start = end


@torch.no_grad()
def _require_same(model: PreTrainedModel, written: Path, folder: str, to: str) -> None:
    """Raise `LayershareError` unless what was written gives the model's logits: for a prompt, more tokens, and one."""
    run, cache = (_in_onnxruntime if to == "onnx" else _in_openvino)(written), DynamicCache()
    for call in _calls(model, rows=3, lengths=(6, 4, 1), padding=2):
        with alone():
            expected = model(**call, past_key_values=cache, use_cache=True).logits
            got = torch.from_numpy(run({name: tensor.numpy() for name, tensor in call.items()}))
        read = call["attention_mask"][:, -expected.shape[1] :].bool()  # what comes out for padding is nothing
        apart = (got - expected)[read].abs().max() / expected[read].abs().max()
        if not apart <= TOLERANCE:
            raise LayershareError(
                f"The {to} graph of '{folder}' computes something else than the model (its logits are {apart:.1g} "
                "apart): use --to dense."
            )


def _in_onnxruntime(folder: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """What gives the logits of calls of an ONNX graph, one after the other."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    known: dict[str, np.ndarray] = {}  # the keys and values of earlier calls

    def run(call: dict[str, np.ndarray]) -> np.ndarray:
        fed = {}
        for each in session.get_inputs():
            if each.name in call:
                fed[each.name] = call[each.name]
            else:
                _, heads, _, width = each.shape
                none = np.zeros((len(call["input_ids"]), heads, 0, width), np.float32)
                fed[each.name] = known.get(each.name.replace("input.", "output.", 1), none)
        names = [each.name for each in session.get_outputs()]
        known.update(zip(names, map(np.asarray, session.run(names, fed)), strict=True))
        return known["logits"]

    return run


def _in_openvino(folder: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """What gives the logits of calls of an OpenVINO model, one after the other."""
    import openvino

    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU")
    request, names = compiled.create_infer_request(), {name for each in compiled.inputs for name in each.names}

    def run(call: dict[str, np.ndarray]) -> np.ndarray:
        order = {"beam_idx": np.arange(len(call["input_ids"]), dtype=np.int32)}
        fed = {name: array for name, array in (call | order).items() if name in names}
        return request.infer(fed)["logits"].copy()

    return run
