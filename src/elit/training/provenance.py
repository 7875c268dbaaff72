"""What computed a checkpoint: versions of packages, and the commit of the library."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import elit


def provenance() -> dict[str, Any]:
    """Collects the versions of Python and of the packages that train, and the commit of the library's checkout.

    Training does not need any of it: what cannot be found out is None.
    """
    packages = {name: _version(name) for name in ("torch", "accelerate")}
    versions = {"python": platform.python_version(), "elit-diffusion": elit.__version__, **packages}
    return {"versions": versions, "commit": library_commit()}


def library_commit(package: Path = Path(elit.__file__).parent) -> str | None:
    """Returns the git commit of the checkout that a package is imported from.

    None without git, and for an installed package: one that lies in a virtual environment inside another repository
    would else be taken for a part of that repository.
    """
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    toplevel, commit = output.splitlines()
    own = Path(toplevel).resolve() / "src" / package.name == package.resolve()
    return commit if own else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
