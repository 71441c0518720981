"""Archives as data: one file per provider.

Adding an archive is adding a file here whose `ARCHIVES` lists what it describes.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from pipeline.archives.descriptor import Archive, OffsetRule, Signing
from pipeline.archives.local import archive_at

__all__ = ["Archive", "OffsetRule", "Signing", "archive_named", "known_archives"]


@cache
def known_archives() -> dict[str, Archive]:
    """Name -> archive, of all files beside this one."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    archives = [archive for module in modules for archive in getattr(module, "ARCHIVES", ())]
    known = {archive.name: archive for archive in archives}
    assert len(known) == len(archives), [archive.name for archive in archives]
    return known


def archive_named(name: str) -> Archive:
    """The archive of a name, or any STAC API with Planetary Computer's collections and plain hrefs by its URL.

    Raises:
        ValueError: Neither a known name nor an http(s) URL.
    """
    if name in known_archives():
        return known_archives()[name]
    if name.startswith(("http://", "https://")):
        return archive_at(name)
    raise ValueError(
        f"archive={name!r} is neither one of {', '.join(sorted(known_archives()))} nor the URL of a STAC API"
    )
