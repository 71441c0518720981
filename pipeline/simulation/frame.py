"""Where a simulated raster lies, and where its pixels fall on the plane on which the landscape is defined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from affine import Affine
from pyproj import Transformer
from shapely.geometry.base import BaseGeometry

from pipeline.simulation.noise import Floats

_STRIDE_PX = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """The world plane: metres east and north of an anchor in one map projection, continued past its zone."""

    epsg: int
    anchor_x_m: float
    anchor_y_m: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A north-up raster: its map projection, upper-left corner, pixel side and size."""

    epsg: int
    left: float
    """Metres, or degrees for 4326."""

    top: float
    resolution: float
    """Side of a pixel in the units of the projection."""

    width_px: int
    height_px: int

    @property
    def transform(self) -> Affine:
        """Pixel (column, row) -> (x, y)."""
        return Affine(self.resolution, 0.0, self.left, 0.0, -self.resolution, self.top)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top)."""
        right = self.left + self.width_px * self.resolution
        return self.left, self.top - self.height_px * self.resolution, right, self.top

    def coarser(self, factor: int) -> Frame:
        """The same ground with pixels `factor` times as wide; the size must divide."""
        if self.width_px % factor or self.height_px % factor:
            raise ValueError(f"{self.width_px} x {self.height_px} px do not divide by {factor}")
        return Frame(
            epsg=self.epsg,
            left=self.left,
            top=self.top,
            resolution=self.resolution * factor,
            width_px=self.width_px // factor,
            height_px=self.height_px // factor,
        )

    def rows(self, start: int, stop: int) -> Frame:
        """The part between two rows."""
        top = self.top - start * self.resolution
        return Frame(
            epsg=self.epsg, left=self.left, top=top, resolution=self.resolution,
            width_px=self.width_px, height_px=stop - start,
        )  # fmt: skip

    def on_plane(self, plane: Plane) -> tuple[Floats, Floats]:
        """Where the pixel centres lie on the plane.

        Returns:
            x and y in metres from the plane's anchor, which broadcast to (row, column).
        """
        if self.epsg == plane.epsg:
            x = self.left + (np.arange(self.width_px) + 0.5) * self.resolution - plane.anchor_x_m
            y = self.top - (np.arange(self.height_px) + 0.5) * self.resolution - plane.anchor_y_m
            return x.astype(np.float32)[np.newaxis, :], y.astype(np.float32)[:, np.newaxis]
        return self._transformed(plane)

    def footprint(self, outline: BaseGeometry | None = None) -> BaseGeometry:
        """Longitude/latitude outline of the frame, or of a part of it given in its own projection."""
        part = shapely.box(*self.bounds) if outline is None else outline
        if self.epsg == 4326:
            return part
        to_lonlat = Transformer.from_crs(self.epsg, 4326, always_xy=True)
        dense = shapely.segmentize(part, max(self.width_px, self.height_px) * self.resolution / 4)
        return shapely.transform(dense, lambda xy: np.column_stack(to_lonlat.transform(xy[:, 0], xy[:, 1])))

    def _transformed(self, plane: Plane) -> tuple[Floats, Floats]:
        """Exact at every 16th node, linear between: off by less than a millimetre at 10 m pixels."""
        columns = np.arange(0, self.width_px + _STRIDE_PX, _STRIDE_PX)
        rows = np.arange(0, self.height_px + _STRIDE_PX, _STRIDE_PX)
        x, y = np.meshgrid(self.left + (columns + 0.5) * self.resolution, self.top - (rows + 0.5) * self.resolution)
        plane_x, plane_y = Transformer.from_crs(self.epsg, plane.epsg, always_xy=True).transform(x, y)
        shape = self.height_px, self.width_px
        return (
            enlarge((plane_x - plane.anchor_x_m).astype(np.float32), _STRIDE_PX, shape),
            enlarge((plane_y - plane.anchor_y_m).astype(np.float32), _STRIDE_PX, shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The land of one area."""

    plane: Plane
    frame: Frame
    """In the plane's own projection, around every scene of that projection: surveyed once for all of them."""

    def __post_init__(self) -> None:
        if self.frame.epsg != self.plane.epsg:
            raise ValueError(f"ground of EPSG:{self.frame.epsg} on a plane of EPSG:{self.plane.epsg}")

    def offset_of(self, part: Frame) -> tuple[int, int]:
        """(row, column) at which a frame of the same projection and pixels begins."""
        row = (self.frame.top - part.top) / part.resolution
        column = (part.left - self.frame.left) / part.resolution
        if not (row.is_integer() and column.is_integer() and row >= 0 and column >= 0):
            raise ValueError(f"{part} does not lie on the pixels of {self.frame}")
        return int(row), int(column)


def enlarge(nodes: Floats, stride: int, shape: tuple[int, int]) -> Floats:
    """Linear interpolation of node (row, column) values `stride` pixels apart to (row, column) pixels of `shape`."""
    return _between(_between(nodes, stride, shape[0]).T, stride, shape[1]).T


def _between(nodes: Floats, stride: int, size: int) -> Floats:
    """Along the first axis; node k sits on pixel k * stride."""
    node, rest = np.divmod(np.arange(size), stride)
    share = (rest / stride).astype(np.float32)[:, np.newaxis]
    mixed: Floats = nodes[node] * (1 - share) + nodes[node + 1] * share
    return mixed
