"""ONNX files: converting a graph, quantizing it, and running it with ONNX Runtime."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from elit.atomic import atomic_file, make_folder
from elit.errors import ElitError, first_line
from elit.export.archive import Run
from elit.export.metadata import KEY

OPSET = 20
LARGEST = 2**31 - 2**26  # bytes of weights in one file: protobuf holds 2 GiB
SIZES = {"t": ("batch",), "latents": ("batch",), "tokens": ("batch", "words"), "latent_index": ("latents",)}


def need(package: str) -> Any:
    """Imports a package of the extra ``export``.

    Raises:
        ElitError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ElitError(f"ONNX needs {package}: pip install 'elit-diffusion[export]'") from error


def convert(program: ExportedProgram, metadata: str) -> Any:
    """Converts a graph to an ONNX model, with metadata and with sizes and outputs that have names."""
    need("onnx")
    need("onnxscript")
    with _silent():
        converted = torch.onnx.export(program, opset_version=OPSET, verbose=False)
    assert converted is not None
    model = converted.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    _name_sizes(model)
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, metadata
    return model


def _name_sizes(model: Any) -> None:
    """Gives the sizes that may be any the names batch, words, latents and weak_latents."""
    known: dict[str, str] = {}
    for value in model.graph.input:
        term = "weak_" if value.name.startswith("weak_latent") else ""
        names = SIZES.get(value.name.removeprefix("weak_"), ())
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            if dim.dim_param:
                known[dim.dim_param] = term + name
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = known.get(dim.dim_param, dim.dim_param)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps the exporter's progress and hints from the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def quantize(model: Any) -> Any:
    """Stores the weights of linear layers in 8 bits, one scale per output channel; activations follow as they come."""
    onnx = need("onnx")
    need("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = {entry.key: entry.value for entry in model.metadata_props}
    with tempfile.TemporaryDirectory() as folder, _silent():
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises a preparation that our graphs do not need
        try:
            quantize_dynamic(
                source, target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
            )
        finally:
            root.setLevel(level)
        quantized = onnx.load(target)
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, kept)
    return quantized


def save(model: Any, path: Path) -> None:
    """Writes an ONNX model, whole or not at all; with its weights in FILE.data beside it where they exceed 2 GiB."""
    onnx = need("onnx")
    if model.ByteSize() <= LARGEST:
        with atomic_file(path) as temporary:
            onnx.save(model, temporary)
        return
    make_folder(path.parent)
    weights = f"{path.name}.data"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        onnx.save(model, Path(folder) / path.name, save_as_external_data=True, location=weights)
        (Path(folder) / weights).replace(path.parent / weights)
        (Path(folder) / path.name).replace(path)


def read_metadata(path: Path) -> str | None:
    """Reads the metadata of an ONNX file, and checks that its weights lie in it or beside it.

    Raises:
        ElitError: it is no ONNX file, it is damaged, or its weights are to be read from another folder.
    """
    onnx = need("onnx")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:
        raise ElitError(f"{path} is damaged or no ONNX file") from error
    for tensor in tensors_of(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                _check_location(path, entry.value)
    found = {entry.key: entry.value for entry in model.metadata_props}
    if model.functions:
        raise ElitError(f"{path} is not loaded: it defines functions, which no file of elit export does")
    return found.get(KEY)


def tensors_of(graph: Any) -> Iterator[Any]:
    """Yields all tensors of a graph, also those in attributes and in graphs inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors_of(inner)


def _check_location(path: Path, location: str) -> None:
    folder = path.parent.resolve()
    wanted = (folder / location).resolve()  # also through links
    if Path(location).is_absolute() or wanted.parent != folder:
        raise ElitError(f"{path} is not loaded: it reads weights from {location!r}, outside its folder")


def load(path: Path, device: torch.device) -> Run:
    """Loads an ONNX file into ONNX Runtime, with as many threads as PyTorch has.

    Raises:
        ElitError: it is damaged, or ONNX Runtime lacks the device.
    """
    runtime = need("onnxruntime")
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
        if providers[0] not in runtime.get_available_providers():
            raise ElitError("this ONNX Runtime has no GPU; take device cpu, or install onnxruntime-gpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common class
        raise ElitError(f"{path} is damaged, or ONNX Runtime cannot run it ({first_line(error)})") from error

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
        return tuple(torch.from_numpy(output).to(device) for output in outputs)

    return run
