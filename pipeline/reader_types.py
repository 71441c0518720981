"""The nouns of reading: what is to be read, over which windows, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
from affine import Affine
from numpy.typing import NDArray

from pipeline.types import ChipError

Bounds = tuple[float, float, float, float]
"""(left, bottom, right, top) in metres of a zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of one zone's plane."""

    epsg: int

    bounds: Bounds
    """(left, bottom, right, top) in metres, multiples of 60 from the zone's anchor."""

    square_m: int | None = None
    """Side of the squares, counted from the north-western corner, that are warped each by itself where a file lies on
    another grid: with the side of its cells, a window gives each cell the pixels that it would have alone. Unset: the
    window is one."""

    def shape(self, resolution_m: int) -> tuple[int, int]:
        """(rows, columns) at a resolution."""
        left, bottom, right, top = self.bounds
        return round((top - bottom) / resolution_m), round((right - left) / resolution_m)

    def squares(self) -> list[Window]:
        """The window's squares, row by row from the north-west; at its far edges they may be cut short."""
        left, bottom, right, top = self.bounds
        across, down = (self.square_m or end - start for start, end in ((left, right), (bottom, top)))
        return [
            Window(epsg=self.epsg, bounds=(x, max(bottom, y - down), min(right, x + across), y))
            for y in _steps(top, bottom, -down)
            for x in _steps(left, right, across)
        ]


def _steps(start: float, end: float, step: float) -> list[float]:
    return [start + number * step for number in range(math.ceil((end - start) / step))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One asset of one item, and how it is to be read."""

    item: str

    band: str

    href: str
    """Unsigned."""

    resolution_m: int
    """Of the pixels that are wanted; a file that has others is warped."""

    fill: np.generic
    """What stands where there is no data; pixels are read as its type."""

    nodata: float
    """What the file holds where there is no data, whether its header says so or not."""

    smooth: bool
    """Bilinear rather than nearest neighbour where the file has to be warped."""

    windows: tuple[Window, ...]
    """What is read of it; of one zone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Where a file says that it lies."""

    epsg: int | None
    transform: Affine
    width: int
    height: int
    nodata: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What was read of a source."""

    arrays: tuple[NDArray[Any], ...]
    """(y, x) for each of the source's windows."""

    header: Header


Finish = Callable[[Source, NDArray[Any]], NDArray[Any]]
"""What is done to a source's pixels over a window as soon as they are read, by the thread that read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a read is tried."""

    attempts: int = 7
    """How often what may pass is tried: with the pauses between, for two minutes at least."""

    backoff_s: float = 2.0
    """Pause before the second attempt, or up to half as long again; it doubles with each."""

    timeout_s: float = 30.0
    """For one request."""

    longest_wait_s: float = 120.0
    """A server that asks for a longer pause is given up."""


Kind = Literal["forbidden", "missing", "busy", "damaged", "unreadable", "empty", "wrong"]
"""Why a read failed. forbidden: the signature is not, or no longer, accepted. missing: there is no such file. busy: the
server has no time, fails, or does not answer. damaged: some of the file's pixels cannot be decoded, others may.
unreadable: the file cannot be read at all. empty: no data at all where the item has data. wrong: the pixels are not in
the unit that they should be in."""

PASSING: Final[tuple[Kind, ...]] = ("forbidden", "busy")
"""Kinds of failure that may pass."""


class ReadError(ChipError):
    """An asset could not be read; the message names the item and the band, and holds no signature.

    Args:
        message: What failed.
        kind: Why.
        status: The HTTP status, where a server gave one.
        retry_after_s: The pause that the server asked for, where it did.
    """

    def __init__(
        self, message: str, *, kind: Kind, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, transient=kind in PASSING)
        self.kind = kind
        self.status = status
        self.retry_after_s = retry_after_s


class Engine(Protocol):
    """Reads the pixels; two of them do it, and agree pixel by pixel where a file lies on the grid."""

    def read(self, sources: Sequence[Source], paths: Sequence[str], finish: Finish) -> list[Pixels | Exception]:
        """Read sources, all at once; for each its pixels, or why there are none.

        Args:
            sources: What to read.
            paths: How GDAL is to open each, signed.
            finish: Applied to every array.
        """
