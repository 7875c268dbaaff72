"""Files of torch.export (.pt2) and packages of AOTInductor: writing them, and loading them with distrust.

``torch.export.load`` trusts its file: it unpickles tensors and example inputs that say they are pickled, evaluates the
expressions of sizes, and calls whatever a node names under ``torch``. We write none of that beyond a few operators, so
:func:`check` refuses files with anything else, and what is left cannot do more than compute. A package of AOTInductor
is machine code and cannot be checked at all: it runs only where the caller says that it is trusted.
"""

import json
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from elit.atomic import atomic_file
from elit.errors import ElitError, first_line
from elit.export.metadata import KEY

Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
"""Runs a graph: its inputs by name -> its outputs."""

EXTRA = f"{KEY}.json"
NATIVE = "data/aotinductor/"
RECORDS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|models/model\.json|data/sample_inputs/model\.pt|extra/{EXTRA}|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)"
)
OPERATORS = """
    _operator.add _operator.floordiv _operator.getitem _operator.mul _operator.sub
    aten._assert_tensor_metadata.default aten.add.Tensor aten.addcmul.default aten.alias.default aten.arange.default
    aten.arange.start aten.cat.default aten.chunk.default aten.clamp.default aten.clone.default aten.cos.default
    aten.div.Tensor aten.embedding.default aten.exp.default aten.expand.default aten.flatten.using_ints
    aten.gelu.default aten.index_copy.default aten.index_select.default aten.layer_norm.default aten.linear.default
    aten.mean.dim aten.mul.Tensor aten.neg.default aten.ones_like.default aten.pad.default aten.permute.default
    aten.promote_types.default aten.reshape.default aten.rsqrt.default aten.scaled_dot_product_attention.default
    aten.select.int aten.silu.default aten.sin.default aten.slice.Tensor aten.split.Tensor
    aten.split_with_sizes.default aten.sqrt.default aten.square.default aten.squeeze.dim aten.stack.default
    aten.sub.Tensor aten.sum.dim_IntList aten.sym_size.int aten.to.device aten.to.dtype aten.transpose.int
    aten.unbind.int aten.unflatten.int aten.unsqueeze.default aten.view.default aten.view_as.default
    """.split()  # noqa: SIM905  # as a list it takes a page
"""All that the graphs of our backbones are made of."""
EXPRESSION = re.compile(r"'[a-z]+\d+'|[A-Za-z]+|[\d(), =*+-]")
IN_EXPRESSIONS = {"Add", "Integer", "Mul", "Symbol", "True", "integer", "nonnegative", "positive"}
IN_TREES = {None, "builtins.tuple", "builtins.dict", "builtins.list"}


def save_program(program: ExportedProgram, path: Path, metadata: str) -> None:
    """Writes a graph with its weights and metadata, whole or not at all."""
    program.example_inputs = None  # they would be pickled
    with atomic_file(path) as temporary:
        torch.export.save(program, temporary, extra_files={EXTRA: metadata})


def save_package(program: ExportedProgram, path: Path, metadata: str) -> None:
    """Compiles a graph for the processor of its weights and writes the package, whole or not at all.

    Raises:
        ElitError: there is no working compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    with atomic_file(path) as temporary:
        try:
            aoti_compile_and_package(program, package_path=str(temporary))
        except (InvalidCxxCompiler, CppCompileError) as error:
            raise ElitError(f"a package needs a C++ compiler, such as g++ ({_first_sentence(error)})") from error
        with zipfile.ZipFile(temporary, "a") as package:
            root = package.namelist()[0].partition("/")[0]
            package.writestr(f"{root}/extra/{EXTRA}", metadata)


def read_metadata(path: Path) -> tuple[str | None, bool]:
    """Reads the metadata of an archive, and whether it holds machine code. Nothing of it is loaded.

    Raises:
        ElitError: it is no archive of PyTorch, or damaged.
    """
    with _opened(path) as reader:
        names = reader.get_all_records()
        text = reader.get_record(f"extra/{EXTRA}") if f"extra/{EXTRA}" in names else None
        return None if text is None else text.decode(), any(name.startswith(NATIVE) for name in names)


def load_program(path: Path, device: torch.device) -> Run:
    """Loads a graph that passes :func:`check`, and returns what runs it.

    Raises:
        ElitError: it does not pass, or is damaged.
    """
    from torch.export.passes import move_to_device_pass

    check(path)
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        module = program.module(check_guards=False)  # its caller checks the inputs
    except Exception as error:  # of any kind, for a file may be damaged anywhere
        raise ElitError(
            f"{path} is damaged, or another version of PyTorch wrote it ({_first_sentence(error)})"
        ) from error

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(module(**inputs))

    return run


def load_package(path: Path) -> Run:
    """Loads the machine code of a package, which can do whatever this process can.

    PyTorch's ``aoti_load_package`` would import its compiler and run a C++ compiler to ask which instructions there
    are, and would read how inputs are ordered again at each call. So its loader is called here without it.

    Raises:
        ElitError: it is damaged, or for another machine.
    """
    from torch.utils._pytree import treespec_loads

    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        check_machine(path, loader.load_metadata_from_package(str(path), "model"))
        package = loader(str(path), "model")
        order = treespec_loads(package.get_call_spec()[0]).child(1).context  # of the keyword arguments
    except ElitError:
        raise
    except Exception as error:
        raise ElitError(f"{path} is damaged, or a package for another machine ({_first_sentence(error)})") from error

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(package.boxed_run([inputs[name] for name in order]))

    return run


def check_machine(path: Path, compiled_for: dict[str, str]) -> None:
    """Checks that this is the kind of machine that a package was compiled for: others would end the process.

    Raises:
        ElitError: it is another one.
    """
    wanted = (compiled_for["AOTI_PLATFORM"], compiled_for["AOTI_MACHINE"])
    if (here := (sys.platform, platform.machine())) != wanted:
        raise ElitError(f"{path} is a package for {' on '.join(wanted)}, and this is {' on '.join(here)}")
    if "AVX512" in compiled_for["AOTI_CPU_ISA"] and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        raise ElitError(f"{path} is a package for processors with AVX-512, which this one lacks; export it here")


def check(path: Path) -> None:
    """Checks that loading an archive and running its graph only computes.

    It is read by the reader that PyTorch will load it with, so that both see the same.

    Raises:
        ElitError: the archive holds something that our export does not write.
    """
    with _opened(path) as reader:
        for name in reader.get_all_records():
            if not RECORDS.fullmatch(name):
                raise _refused(path, f"it holds {name}")
        if reader.get_record("data/sample_inputs/model.pt"):
            raise _refused(path, "it holds example inputs")
        for name in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
            for payload in json.loads(reader.get_record(name))["config"].values():
                if payload["use_pickle"] is not False:
                    raise _refused(path, "its weights are pickled")
        graph = json.loads(reader.get_record("models/model.json"))
        if graph["guards_code"]:
            raise _refused(path, "it has conditions that are code")
        for key, value in _entries(graph):
            check_entry(path, key, value)


def check_entry(path: Path, key: str, value: Any) -> None:
    """Checks one entry of the JSON of a graph, at any depth: those that the loader evaluates or looks up by name."""
    if key == "target" and str(value).removeprefix("torch.ops.") not in OPERATORS:
        raise _refused(path, f"it calls {value}")
    if key == "expr_str":
        words = EXPRESSION.findall(value)
        if "".join(words) != value or any(word.isalpha() and word not in IN_EXPRESSIONS for word in words):
            raise _refused(path, "a size in it is no plain expression")
    if key == "metadata" and value != {}:
        raise _refused(path, "its nodes have metadata")
    if key in ("in_spec", "out_spec") and any(t not in IN_TREES for k, t in _entries(json.loads(value)) if k == "type"):
        raise _refused(path, "its inputs are of unknown types")


def _entries(node: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, at any depth of JSON."""
    if isinstance(node, dict):
        yield from node.items()
        for value in node.values():
            yield from _entries(value)
    elif isinstance(node, list):
        for value in node:
            yield from _entries(value)


def _refused(path: Path, reason: str) -> ElitError:
    return ElitError(f"{path} is not loaded: {reason}, which no file of elit export does")


@contextmanager
def _opened(path: Path) -> Iterator[torch._C.PyTorchFileReader]:
    """Opens an archive with PyTorch's own reader, and tells every error in the block as one of the file."""
    try:
        reader = torch._C.PyTorchFileReader(str(path))  # torch.export.pt2_archive has the same, behind its compiler
        if reader.get_record("archive_format") != b"pt2":
            raise _refused(path, "it is of an old format")
        yield reader
    except ElitError:
        raise
    except Exception as error:  # the reader has its own kinds
        raise ElitError(f"{path} is damaged or no exported file ({_first_sentence(error)})") from error


def _first_sentence(error: BaseException) -> str:
    return first_line(error).partition(". ")[0][:200]
