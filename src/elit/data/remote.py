"""Data behind URLs, through fsspec.

The caches of fsspec itself (``filecache``, ``simplecache``) keep files under hashed names in one flat folder, and do
not keep processes apart; data sets need their folders and names, so the copying is here.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elit.atomic import atomic_file
from elit.errors import ElitError
from elit.launch import file_lock

FETCHERS = 16  # files at a time: of small ones, the answer of the store takes longer than the bytes


def cache_folder() -> Path:
    """Returns the folder of copies, weights and features: ``$ELIT_CACHE``, or ``elit`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ELIT_CACHE") or Path(base) / "elit")


def local_copy(location: str | Path) -> Path:
    """Returns a path as it is, and for a URL (``s3://bucket/folder``, ``https://.../x.zip``) its copy in the cache.

    Files that are in the cache with the right size are not fetched again, so an interrupted copy continues.

    Raises:
        ElitError: nothing is there, it cannot be fetched, or its protocol needs a package that is not installed.
    """
    url = str(location)
    if "://" not in url:
        return Path(location)
    import fsspec

    folder = cache_folder() / sha256(url.rstrip("/").encode()).hexdigest()[:16]
    try:
        system, root = fsspec.core.url_to_fs(url)
        if not system.exists(root):
            raise FileNotFoundError("it does not exist")
        if system.isfile(root):
            _fetch(system, folder, {root: Path(root).name}, {root: system.size(root)})
            return folder / Path(root).name
        # A name that ends in a slash is no file: some stores keep folders as empty objects.
        sizes = {file: info["size"] for file, info in system.find(root, detail=True).items() if file[-1] != "/"}
        names = {file: os.path.relpath(file, root) for file in sizes}
        if any(name.startswith("..") for name in names.values()):
            raise ElitError(f"{url} has names that lead out of it; nothing of it is copied")
        _fetch(system, folder, names, sizes)
    except ElitError:
        raise
    except Exception as error:  # every protocol has its own exceptions
        raise ElitError(f"cannot fetch {url} ({type(error).__name__}: {error})") from error
    return folder


def _fetch(system: Any, folder: Path, names: dict[str, str], sizes: dict[str, int]) -> None:
    """Copies the files that are missing, several at a time; one process of a machine copies and the others wait."""

    def is_there(file: str) -> bool:
        target = folder / names[file]
        return target.exists() and target.stat().st_size == sizes[file]

    def fetch(file: str) -> None:
        with atomic_file(folder / names[file], sync=False) as temporary:
            system.get_file(file, str(temporary))

    with file_lock(folder.with_suffix(".lock")):
        missing = [file for file in names if not is_there(file)]
        pool = ThreadPoolExecutor(FETCHERS)
        try:
            list(tqdm(pool.map(fetch, missing), total=len(missing), desc="copying", unit="file", disable=not missing))
        finally:
            pool.shutdown(cancel_futures=True)
