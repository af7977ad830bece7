"""What a job is made of: the project's packages and the files of one config, in a zip that a cluster unpacks."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from sapo_ray.config_loader import config_files
from sapo_ray.errors import SapoError
from sapo_ray.files import is_uri

UPLOAD_LIMIT = 100 * 2**20
"""Bytes of the largest request that Ray's job server takes."""

_PROJECT = Path(__file__).parents[1]
_FOLDERS = ("launch", "actors", "sapo_ray", "configs")


def pack(config: Path, package: Path) -> str:
    """Write the zip file `package`; the config's path within it.

    The config and all that it extends keep their places relative to each other. Raises SapoError for a config that
    extends an absolute path, and for a package that is too large.
    """
    files = {file.relative_to(_PROJECT): file for folder in _FOLDERS for file in (_PROJECT / folder).rglob("*")}
    files = {name: file for name, file in files.items() if file.is_file() and "__pycache__" not in name.parts}
    configs = _place(config)
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for name, file in sorted((files | configs).items()):
            archive.write(file, name)
        largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
    size = package.stat().st_size
    if size > UPLOAD_LIMIT:
        raise SapoError(
            f"the job's package has {size / 2**20:.1f} MiB, more than the {UPLOAD_LIMIT / 2**20:g} MiB that Ray takes; "
            f"{largest.compress_size / 2**20:.1f} MiB of it are {largest.filename}: keep data out of "
            f"{', '.join(_FOLDERS)}"
        )
    return str(next(reversed(configs)))


def _place(config: Path) -> dict[Path, Path]:
    """Every file of a config by its path in the package, the config itself last: the checkout's, or under `config`.

    What it extends by a URI is read from there wherever the job runs.
    """
    layers = [layer for layer in config_files(os.path.relpath(config)) if not is_uri(layer)]
    for layer in layers:
        if os.path.isabs(layer):  # the config's own path is relative here, so something extends this one
            raise SapoError(f"{config}: extends {layer}; a job needs it as a path relative to the file that extends it")
    found = [Path(os.path.abspath(layer)) for layer in layers]
    if all(file.is_relative_to(_PROJECT) for file in found):
        return {file.relative_to(_PROJECT): file for file in found}
    top = os.path.commonpath([file.parent for file in found])
    return {Path("config", file.relative_to(top)): file for file in found}
