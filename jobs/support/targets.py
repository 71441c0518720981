"""Which version of a store a build is about: the one under way, one that is there already, or a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.appends import with_open_failures
from pipeline.canonical import differences
from pipeline.layout import Layout
from pipeline.objects import Objects
from pipeline.store import Store, StoreError
from pipeline.versions import Version, latest

Mode = Literal["build", "append", "retry"]
"""build: one request, one version. append: another request becomes a new version. retry: what failed in sealed
versions becomes a new version."""

_FOREVER = ("splits", "seed", "side_px")
"""Settings that all versions share: a chip's split must not depend on the version that it came with."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a build works on."""

    number: int

    version: Version | None
    """None where it has not been begun."""

    request: dict[str, Any]

    @property
    def needs_search(self) -> bool:
        """Whether it is not planned, and not from what other versions left."""
        return "retries_after" not in self.request and (self.version is None or self.version.state == "planning")


def target_of(url: str, layout: Layout, request: dict[str, Any], mode: Mode) -> Target:
    """Find the version that a request is about. Writes nothing.

    Raises:
        StoreError: The store holds another layout, or another request and may not be appended to; or nothing failed
            that could be tried again.
    """
    newest = _newest(url, layout)
    if newest is None:
        if mode == "retry":
            raise StoreError(f"{url} has no version yet: there is nothing to try again")
        return Target(number=1, version=None, request=request)
    if mode == "retry":
        return _retry(newest, request)
    if newest.state != "sealed":
        return _under_way(newest, request)
    for version in reversed(newest.versions()):
        if not list(differences(version.request, request)):
            return Target(number=version.number, version=version, request=request)
    if mode == "build":
        changed = "; ".join(differences(newest.request, request))
        raise StoreError(f"{newest.name} was built from another request: {changed}; --append adds yours as a version")
    first = newest.versions()[0].request
    theirs, yours = ({name: of.get(name) for name in _FOREVER} for of in (first, request))
    if changed := "; ".join(differences(theirs, yours)):
        raise StoreError(f"{url}: all versions must share {', '.join(_FOREVER)}; yours differ: {changed}")
    return Target(number=newest.number + 1, version=None, request=request)


def _newest(url: str, layout: Layout) -> Version | None:
    if not Objects.at(url).exists("zarr.json"):
        return None
    Store.create(url, layout)
    return latest(url)


def _retry(newest: Version, request: dict[str, Any]) -> Target:
    if newest.state == "sealed":
        following = Version(newest.url, newest.number + 1)
        if not with_open_failures(following):
            raise StoreError(f"{newest.name}: no candidate of any version failed; there is nothing to try again")
        return Target(number=following.number, version=None, request={**request, "retries_after": newest.number})
    return _under_way(newest, {**request, "retries_after": newest.number - 1})


def _under_way(newest: Version, request: dict[str, Any]) -> Target:
    changed = list(differences(newest.request, request))
    if changed:
        raise StoreError(f"{newest.name} was begun with another request: {'; '.join(changed)}; complete that one first")
    return Target(number=newest.number, version=newest, request=request)
