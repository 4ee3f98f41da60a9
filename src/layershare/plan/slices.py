"""What slicing does to the tensors of a checkpoint: which go, which change, which come, and their new shapes."""

from layershare.model.arch import Linear, Spec
from layershare.model.checkpoint import Tensors


def treated(spec: Spec) -> set[str]:
    """Full names of the dense tensors that slicing changes or takes away."""
    stream = spec.sliceable()
    names = [*stream.embeddings, stream.final_norm]
    for part in stream.sublayers:
        names += [part.norm, *part.readers, part.writer]
    prefixes = (*(f"{spec.base_prefix}{name}." for name in names), f"{stream.head}.")
    return {name for name in spec.tensors if name.startswith(prefixes)}


def sliced_tensors(spec: Spec, width: int) -> Tensors:
    """Shape and dtype, by full name, of the tensors of a sliced model that a dense one lacks or has in another shape.

    The head is among them even where it was tied to the embedding: the two are rotated differently.
    """
    stream = spec.sliceable()
    tensors: Tensors = {}
    for name in stream.embeddings:
        (rows, _), dtype = spec.tensors[f"{spec.base_prefix}{name}.weight"]
        tensors[f"{spec.base_prefix}{name}.weight"] = ((rows, width), dtype)
    linears = {linear.name: linear for linear in spec.linears}
    for part in stream.sublayers:
        for name in part.readers:
            reader = linears[name]
            tensors |= _linear(spec, reader, width, reader.d_out, reader.bias or stream.shifted)
        writer = linears[part.writer]
        tensors |= _linear(spec, writer, writer.d_in, width, writer.bias)
        tensors[shortcut_name(spec, part.writer)] = ((width, width), spec.tensors[spec.weight_name(writer)][1])
    head = f"{stream.head}.weight"
    dtype = spec.tensors.get(head, spec.tensors[f"{spec.base_prefix}{stream.embeddings[0]}.weight"])[1]
    tensors[head] = ((stream.vocabulary, width), dtype)
    if stream.shifted or f"{stream.head}.bias" in spec.tensors:
        tensors[f"{stream.head}.bias"] = ((stream.vocabulary,), dtype)
    return tensors


def shortcut_name(spec: Spec, writer: str) -> str:
    """Full name of the shortcut matrix beside a writer."""
    return f"{spec.base_prefix}{writer}.shortcut.weight"


def _linear(spec: Spec, linear: Linear, d_in: int, d_out: int, bias: bool) -> Tensors:
    name = spec.weight_name(linear)
    dtype = spec.tensors[name][1]
    shape = (d_in, d_out) if linear.conv1d else (d_out, d_in)
    tensors: Tensors = {name: (shape, dtype)}
    if bias:
        tensors[f"{name.removesuffix('weight')}bias"] = ((d_out,), dtype)
    return tensors


def target_names(spec: Spec) -> list[str]:
    """The weights of the blocks' linears and the shortcut matrices: what counts as the targets of a sliced model."""
    shortcuts = [shortcut_name(spec, part.writer) for part in spec.sliceable().sublayers]
    return [*map(spec.weight_name, spec.linears), *shortcuts]
