"""The layout of a chip store: which arrays it has, and what their numbers mean.

Pixels stay on the sensors' own grids, because that is lossless and half the bytes. The chip's side, the sensors
and the labels are properties of a store, so that data made elsewhere fits into the same format.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.bands import NATIVE_GROUPS, OPTICAL_NODATA, RADAR_BANDS, RADAR_NODATA, RESOLUTION_M, SCL_NODATA
from pipeline.grid import PIXEL_M
from pipeline.types import ChipArrays

LAYOUT_VERSION: Final = 1
"""What this code writes and reads; raised when a store would be misread by older code."""

CODECS: Final = ("lz4", "zstd", "none")
"""blosc lz4 or zstd at level 5 with bitshuffle, or plain pixels."""

WINDOW_STEP_PX: Final = 6
"""On native grids windows start and end at multiples of this many 10 m pixels: there 20 m and 60 m pixels have their
edges too."""

OPTICAL_GRIDS: Final = ("native", "10m")
OPTICAL_LEVELS: Final = ("l2a", "l1c")
RADAR_PRODUCTS: Final = ("gamma0_rtc", "sigma0_grd")

LABEL_NODATA: Final = 255
_LABEL_PREFIX: Final = "label_"
_LABELS: Final = ("labels", "chip_labels")

MODEL_ARRAYS: Final = ("b10", "b20", "b60", "radar")
"""What models take of a chip."""

HARMONISATION: Final = "offset removed: reflectance x 10000 as before processing baseline 04.00"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a store, as far as it is the same for every chip."""

    name: str
    shape: tuple[int, ...]
    """Of one chip: (band, y, x), or (y, x) for classes."""

    dtype: np.dtype[Any]
    nodata: int
    """Also what a hole reads as."""

    bands: tuple[str, ...]
    resolution_m: int
    units: str
    scale: float
    """Stored number x scale = value in `units`."""

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Distinct wherever lengths differ, so that xarray takes the whole group as one dataset."""
        plane = (f"y_{self.resolution_m}m", f"x_{self.resolution_m}m")
        return ("chip", *([f"band_{self.name}"] if len(self.shape) == 3 else []), *plane)

    @property
    def step_px(self) -> int:
        """Side of one pixel of this array, in 10 m pixels."""
        return self.resolution_m // PIXEL_M

    def attributes(self) -> dict[str, Any]:
        """What a reader of the array needs to know, as JSON."""
        names = ("units", "scale", "nodata", "resolution_m")
        return {"bands": list(self.bands), **{name: getattr(self, name) for name in names}}

    def window(self, pixels: NDArray[Any], y_px: int, x_px: int, size_px: int) -> NDArray[Any]:
        """View of the square window of a chip: offsets and side in 10 m pixels, multiples of `step_px`."""
        y, x, size = (value // self.step_px for value in (y_px, x_px, size_px))
        return pixels[..., y : y + size, x : x + size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What decides the arrays of a store; two stores of one layout hold comparable chips."""

    side_px: int = 264
    """Side of a chip in 10 m pixels; where optical bands are on native grids, a multiple of 6."""

    shard_chips: int = 256
    """Rows per shard."""

    codec: str = "lz4"
    """lz4, zstd or none."""

    has_optical: bool = True
    has_radar: bool = True
    optical_level: str | None = "l2a"
    """l2a or l1c; None without optical arrays."""

    optical_grid: str | None = "native"
    """native: bands of 10, 20 and 60 m as the sensor has them; 10m: all on 10 m, where a source has lost the native
    grids. The arrays have the same names and bands; None without optical arrays."""

    has_classes: bool = True
    """Whether a scene classification is there; only where l2a is on native grids."""

    radar_product: str | None = "gamma0_rtc"
    """gamma0_rtc or sigma0_grd; None without a radar array."""

    grid: str | None = "utm-cells"
    """What the cells of the chip table are; None where chips lie anywhere, each with `crs` and `transform`."""

    labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Name -> code -> class name; each is an array of codes at 10 m, 255 where unlabelled."""

    chip_labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Name -> code -> class name; each is a column `label_<name>` of the chip table: one code, or a list of them."""

    def __post_init__(self) -> None:
        if not self.has_optical:
            object.__setattr__(self, "optical_level", None)
            object.__setattr__(self, "optical_grid", None)
        if not self.has_radar:
            object.__setattr__(self, "radar_product", None)
        if (self.optical_level, self.optical_grid) != ("l2a", "native"):
            object.__setattr__(self, "has_classes", False)
        self._refuse_unknown()
        if self.side_px <= 0 or self.side_px % self.window_step_px:
            step = f" multiple of {self.window_step_px}" if self.window_step_px > 1 else ""
            raise ValueError(f"side_px must be a positive{step or ' number'}, got {self.side_px}")
        if self.shard_chips <= 0:
            raise ValueError(f"shard_chips must be positive, got {self.shard_chips}")
        if self.codec not in CODECS:
            raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {self.codec!r}")
        if not (self.has_optical or self.has_radar):
            raise ValueError("a store needs optical or radar arrays, or both")

    @property
    def window_step_px(self) -> int:
        """Windows start and end at multiples of this many 10 m pixels: where pixels of all arrays have their edges."""
        return WINDOW_STEP_PX if self.optical_grid == "native" else 1

    def arrays(self) -> dict[str, ArraySpec]:
        """Array name -> its description, in a fixed order."""
        specs = [*self._optical(), *self._radar(), *(self._classes(_LABEL_PREFIX + name) for name in self.labels)]
        return {spec.name: spec for spec in specs}

    def arrays_of(self, names: Collection[str]) -> dict[str, ArraySpec]:
        """Those of these names that are there."""
        return {name: spec for name, spec in self.arrays().items() if name in names}

    def window_bytes(self, size_px: int, names: Collection[str]) -> int:
        """Bytes of a square window of a chip, its side in 10 m pixels, of these arrays."""
        return sum(
            int(np.prod(spec.shape[:-2])) * (size_px // spec.step_px) ** 2 * spec.dtype.itemsize
            for spec in self.arrays_of(names).values()
        )

    def attributes(self) -> dict[str, Any]:
        """The layout as JSON, for the attributes of the group."""
        labels = {
            key: {
                name: {"classes": {str(code): classes[code] for code in sorted(classes)}}
                for name, classes in getattr(self, key).items()
            }
            for key in _LABELS
        }
        harmonisation = HARMONISATION if self.has_optical else None
        return {**asdict(self), **labels, "layout_version": LAYOUT_VERSION, "harmonisation": harmonisation}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Layout:
        """The layout that `attributes` described; other keys are left aside."""
        labels = {
            key: {
                name: {int(code): title for code, title in label["classes"].items()}
                for name, label in attributes.get(key, {}).items()
            }
            for key in _LABELS
        }
        known = {f.name: attributes[f.name] for f in fields(cls) if f.name in attributes}
        return cls(**{**known, **labels})

    def check(self, row: int, chip: ChipArrays) -> None:
        """Refuse a chip that does not fit.

        Raises:
            ValueError: An array is missing, unknown, or has another dtype or shape; names the row and the array.
        """
        specs = self.arrays()
        if chip.keys() != specs.keys():
            missing, unknown = sorted(specs.keys() - chip.keys()), sorted(chip.keys() - specs.keys())
            raise ValueError(f"row {row}: missing arrays {missing}, unknown arrays {unknown}")
        for name, spec in specs.items():
            pixels = chip[name]
            if pixels.dtype != spec.dtype:
                raise ValueError(f"row {row}: {name} must be {spec.dtype}, got {pixels.dtype}")
            if pixels.shape != spec.shape:
                raise ValueError(f"row {row}: {name} must have shape {spec.shape}, got {pixels.shape}")

    def check_window(self, y_px: int, x_px: int, size_px: int) -> None:
        """Refuse a window that cuts a pixel of a coarser array or leaves the chip."""
        if size_px <= 0 or any(value % self.window_step_px for value in (y_px, x_px, size_px)):
            raise ValueError(f"window ({y_px}, {x_px}, {size_px}) px is not on multiples of {self.window_step_px}")
        if not (0 <= y_px <= self.side_px - size_px and 0 <= x_px <= self.side_px - size_px):
            raise ValueError(f"window ({y_px}, {x_px}, {size_px}) px leaves a chip of {self.side_px} px")

    def _optical(self) -> list[ArraySpec]:
        if not self.has_optical:
            return []
        specs = [
            ArraySpec(
                name=name,
                shape=(len(bands), *self._plane(self._resolution_m(name))),
                dtype=np.dtype(np.uint16),
                nodata=OPTICAL_NODATA,
                bands=bands,
                resolution_m=self._resolution_m(name),
                units="reflectance",
                scale=0.0001,
            )
            for name, bands in NATIVE_GROUPS.items()
        ]
        return [*specs, self._classes("scl")] if self.has_classes else specs

    def _radar(self) -> list[ArraySpec]:
        if not self.has_radar:
            return []
        return [
            ArraySpec(
                name="radar",
                shape=(len(RADAR_BANDS), *self._plane(RESOLUTION_M["radar"])),
                dtype=np.dtype(np.int16),
                nodata=RADAR_NODATA,
                bands=RADAR_BANDS,
                resolution_m=RESOLUTION_M["radar"],
                units="dB",
                scale=0.01,
            )
        ]

    def _classes(self, name: str) -> ArraySpec:
        resolution_m = RESOLUTION_M.get(name, PIXEL_M)
        return ArraySpec(
            name=name,
            shape=self._plane(resolution_m),
            dtype=np.dtype(np.uint8),
            nodata=SCL_NODATA if name == "scl" else LABEL_NODATA,
            bands=(name.removeprefix(_LABEL_PREFIX),),
            resolution_m=resolution_m,
            units="class",
            scale=1.0,
        )

    def _resolution_m(self, name: str) -> int:
        return RESOLUTION_M[name] if self.optical_grid == "native" else PIXEL_M

    def _refuse_unknown(self) -> None:
        for name, known in (
            ("optical_level", OPTICAL_LEVELS),
            ("optical_grid", OPTICAL_GRIDS),
            ("radar_product", RADAR_PRODUCTS),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def _plane(self, resolution_m: int) -> tuple[int, int]:
        side = self.side_px * PIXEL_M // resolution_m
        return side, side
