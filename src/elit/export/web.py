"""A static folder that samples in the browser: the model as an ONNX file, a page, and ONNX Runtime for the web."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from elit.atomic import atomic_folder, write_json
from elit.data.remote import cache_folder
from elit.errors import ElitError
from elit.export.metadata import Metadata, Precision
from elit.export.write import export
from elit.models import Model

RUNTIME = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = (
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
NOTICE = f"""The files of this folder are those of the npm package {RUNTIME} {VERSION}, as it was published.
ONNX Runtime is copyright Microsoft Corporation, under the MIT License:
https://github.com/microsoft/onnxruntime/blob/main/LICENSE
"""
PAGE = ("index.html", "page.js", "planner.js", "random.js", "sampler.js")


def export_web(
    model: Model,
    folder: str | Path,
    *,
    calibration: dict[str, Any] | None = None,
    levels: Sequence[int] | None = None,
    precision: Precision = "fp32",
    class_names: Sequence[str] | None = None,
    path: Literal["linear", "cosine"] = "linear",
    steps: int = 40,
) -> Metadata:
    """Writes a static folder whose page samples in the browser, on WebGPU or else in WebAssembly.

    Any server of files will do: ``python -m http.server -d FOLDER``.

    Args:
        model: one of images whose pixels it makes itself, with a latent interface.
        folder: a new folder.
        calibration: what lower levels and fewer steps cost in error, from which the page plans for a latency:
            ``levels``, falling ``times``, ``errors`` (times, levels), ``step_counts`` and their ``step_errors``. None
            leaves planning out.
        levels, precision, class_names, path, steps: see :func:`elit.export`.

    Raises:
        ElitError: a model that the page cannot show, a folder that exists, or npm does not give the runtime.
    """
    shape = model.input_shape()
    if model.takes_text or model.stage_shapes is not None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ElitError("the page shows models of classes that make pixels themselves; export others as onnx")
    if model.interface is None:
        raise ElitError("the page is about budgets, and this model has no latent interface; export it as onnx")
    runtime = fetch_runtime()
    with atomic_folder(folder) as temporary:
        told = export(
            model,
            temporary / "model.onnx",
            levels=levels,
            precision=precision,
            class_names=class_names,
            path=path,
            steps=steps,
        )
        about = {**asdict(told), "config": {"num_classes": model.config.num_classes}, "calibration": calibration}
        write_json(temporary / "model.json", about)
        for name in PAGE:
            (temporary / name).write_text((files("elit.export") / "web" / name).read_text())
        shutil.copytree(runtime, temporary / "runtime")
    return told


def fetch_runtime() -> Path:
    """Returns the folder of ONNX Runtime for the web, fetched once by npm and checked against the digest that we know.

    Raises:
        ElitError: there is no npm, it does not get the package, or the package is another one.
    """
    folder = cache_folder() / RUNTIME / VERSION
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", f"{RUNTIME}@{VERSION}", "--silent", "--pack-destination", temporary]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, cwd=temporary)
        except FileNotFoundError as error:
            raise ElitError(f"the web format takes {RUNTIME} from npm, and there is no npm here; install it") from error
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise ElitError(f"npm does not give {RUNTIME} {VERSION} ({reason})") from error
        (package,) = Path(temporary).glob("*.tgz")
        digest = "sha512-" + base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        if digest != INTEGRITY:
            raise ElitError(f"npm gave another {RUNTIME} {VERSION} than the one that was released; nothing is written")
        with atomic_folder(folder) as wanted, tarfile.open(package) as archive:
            for name in RUNTIME_FILES:
                member = archive.extractfile(f"package/dist/{name}")
                assert member is not None
                (wanted / name).write_bytes(member.read())
            (wanted / "NOTICE.txt").write_text(NOTICE)
    return folder
