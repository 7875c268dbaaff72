"""Data behind URLs, through fsspec."""

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from elit.atomic import atomic_file
from elit.errors import ElitError


def cache_folder() -> Path:
    """Where copies, weights and features are kept: ``$ELIT_CACHE``, or ``elit`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ELIT_CACHE") or Path(base) / "elit")


def local_copy(location: str | Path) -> Path:
    """A path as it is; of a URL (``s3://bucket/folder``, ``https://.../images.zip``), its copy in the cache.

    Files that are in the cache with the right size are not fetched again, so an interrupted copy continues.

    Raises:
        ElitError: nothing is there, it cannot be fetched, or its protocol needs a package that is not installed.
    """
    url = str(location)
    if "://" not in url:
        return Path(location)
    import fsspec

    folder = cache_folder() / sha256(url.encode()).hexdigest()[:16]
    try:
        system, root = fsspec.core.url_to_fs(url)
        if not system.exists(root):
            raise FileNotFoundError("it does not exist")
        if system.isfile(root):
            target = folder / Path(root).name
            _fetch(system, root, target)
            return target
        for file in system.find(root):
            _fetch(system, file, folder / os.path.relpath(file, root))
    except ElitError:
        raise
    except Exception as error:  # every protocol has its own exceptions
        raise ElitError(f"cannot fetch {url} ({type(error).__name__}: {error})") from error
    return folder


def _fetch(system: Any, file: str, target: Path) -> None:
    if target.exists() and target.stat().st_size == system.size(file):
        return
    with atomic_file(target) as temporary:
        system.get_file(file, str(temporary))
