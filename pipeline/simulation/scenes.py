"""Scenes as plans: which sensor looked where and when, before any pixel is made."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from pipeline.grid import origin_northing_m
from pipeline.simulation.frame import Frame, Ground, Plane


@dataclass(frozen=True, slots=True, kw_only=True)
class Swath:
    """One edge of what was seen: a line across the world plane."""

    heading_deg: float
    """Direction from the edge away from the seen side, clockwise from north."""

    reach_m: float
    """How far from the plane's anchor the edge lies in that direction."""

    def holds(self, frame: Frame, plane: Plane) -> NDArray[np.bool_]:
        """(row, column): whether each pixel's centre was seen."""
        x_m, y_m = frame.on_plane(plane)
        east, north = self._direction()
        seen: NDArray[np.bool_] = x_m * np.float32(east) + y_m * np.float32(north) < self.reach_m
        return seen

    def clip(self, frame: Frame, plane: Plane) -> BaseGeometry:
        """The seen part of a frame that lies in the plane's own projection."""
        assert frame.epsg == plane.epsg, "swath edges are drawn in the plane's own zone"
        east, north = self._direction()
        far = 1e6
        edge_x, edge_y = plane.anchor_x_m + east * self.reach_m, plane.anchor_y_m + north * self.reach_m
        corners = [
            (edge_x - north * far, edge_y + east * far),
            (edge_x + north * far, edge_y - east * far),
            (edge_x + north * far - east * far, edge_y - east * far - north * far),
            (edge_x - north * far - east * far, edge_y + east * far - north * far),
        ]
        return shapely.box(*frame.bounds).intersection(shapely.Polygon(corners))

    def _direction(self) -> tuple[float, float]:
        return math.sin(math.radians(self.heading_deg)), math.cos(math.radians(self.heading_deg))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpticalScene:
    """One Sentinel-2 tile of one overpass."""

    platform: str
    """S2A or S2B."""

    sensed: datetime
    """UTC."""

    baseline: str
    """Processing baseline, such as 04.00."""

    cloud_fraction: float
    """Of the sky, 0-1."""

    frame: Frame
    """10 m pixels; corner on a multiple of 60 m from the equator and easting 0."""

    ground: Ground
    swath: Swath | None = None

    def __post_init__(self) -> None:
        if self.frame.left % 60 or (self.frame.top - origin_northing_m(self.frame.epsg)) % 60:
            corner = self.frame.left, self.frame.top
            raise ValueError(f"a Sentinel-2 corner is a multiple of 60 m from the equator, got {corner}")

    @property
    def offset_dn(self) -> int:
        """What processing adds to digital numbers: 1000 from baseline 04.00 on."""
        return 1000 if float(self.baseline) >= 4.0 else 0

    @property
    def tile(self) -> str:
        """MGRS square of the scene's centre, such as 32UQU."""
        return mgrs_square(self.frame)

    @property
    def id(self) -> str:
        """Named as the Planetary Computer names its items."""
        made = self.sensed + timedelta(hours=9, minutes=int(float(self.baseline)))
        orbit = relative_orbit(self.platform, self.sensed)
        return f"{self.platform}_MSIL2A_{_stamp(self.sensed)}_R{orbit:03d}_T{self.tile}_{_stamp(made)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarScene:
    """One Sentinel-1 slice of one pass, terrain corrected."""

    platform: str
    """S1A or S1B."""

    sensed: datetime
    """Start of sensing, UTC."""

    ascending: bool
    incidence_deg: float
    """At the plane's anchor."""

    frame: Frame
    """10 m pixels; corner on a multiple of 10 m."""

    ground: Ground
    swath: Swath | None = None

    @property
    def ended(self) -> datetime:
        """End of sensing, UTC."""
        return self.sensed + timedelta(seconds=24.999)

    @property
    def id(self) -> str:
        """Named as the Planetary Computer names its items."""
        orbit = absolute_orbit(self.platform, self.sensed)
        # All slices of a pass are of one datatake.
        take = zlib.crc32(f"{self.platform}{orbit}".encode()) & 0xFFFFFF
        times = f"{_stamp(self.sensed)}_{_stamp(self.ended)}"
        return f"{self.platform}_IW_GRDH_1SDV_{times}_{orbit:06d}_{take:06X}_rtc"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScene:
    """The part of one WorldCover tile that the archive holds."""

    frame: Frame
    """EPSG:4326, pixels of 1/12000 degree."""

    ground: Ground

    @property
    def tile(self) -> str:
        """South-western corner of the 3 x 3 degree tile, such as N48E012."""
        left, bottom, right, top = self.frame.bounds
        south = math.floor((bottom + top) / 2 / 3) * 3
        west = math.floor((left + right) / 2 / 3) * 3
        return f"{'N' if south >= 0 else 'S'}{abs(south):02d}{'E' if west >= 0 else 'W'}{abs(west):03d}"

    @property
    def id(self) -> str:
        """Named as the Planetary Computer names its items."""
        return f"ESA_WorldCover_10m_2021_v200_{self.tile}"


Scene = OpticalScene | RadarScene | LabelScene

# A moment at which an orbit began (ascending node), its number, and the days and orbits after which tracks repeat.
_ORBITS = {
    "S1A": (datetime(2024, 4, 19, 4, 18, tzinfo=UTC), 53498, 12, 175),
    "S2A": (datetime(2018, 12, 31, 23, 26, tzinfo=UTC), 18417, 10, 143),
    "S2B": (datetime(2024, 4, 19, 9, 30, tzinfo=UTC), 37185, 10, 143),
}
_TRACK_OF_ORBIT_0 = {"S1A": -73, "S2A": 2, "S2B": 116}


def absolute_orbit(platform: str, when: datetime) -> int:
    """Number of the orbit at a time, counted from launch."""
    start, number, days, orbits = _ORBITS[platform]
    return number + math.floor((when - start) / timedelta(days=days) * orbits)


def relative_orbit(platform: str, when: datetime) -> int:
    """Number of the ground track at a time, 1 to 143 or 175."""
    return (absolute_orbit(platform, when) + _TRACK_OF_ORBIT_0[platform]) % _ORBITS[platform][3] + 1


def mgrs_square(frame: Frame) -> str:
    """Zone, latitude band and 100 km square of a frame's centre."""
    left, bottom, right, top = frame.bounds
    zone = frame.epsg % 100
    latitude = frame.footprint().centroid.y
    band = "CDEFGHJKLMNPQRSTUVWX"[min(int((latitude + 80) // 8), 19)]
    column = "STUVWXYZABCDEFGHJKLMNPQR"[(zone % 3) * 8 + int((left + right) / 2 // 100_000) - 1]
    rows = "ABCDEFGHJKLMNPQRSTUV"
    row = rows[(int((bottom + top) / 2 // 100_000) + (0 if zone % 2 else 5)) % 20]
    return f"{zone:02d}{band}{column}{row}"


def sun_position(when: datetime, lon: float, lat: float) -> tuple[float, float]:
    """(zenith, azimuth clockwise from north) in degrees, good to about a degree."""
    declination = math.radians(23.44) * math.sin(2 * math.pi * (284 + when.timetuple().tm_yday) / 365)
    hour_angle = math.radians((when.hour + when.minute / 60 - 12) * 15 + lon)
    phi = math.radians(lat)
    up = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour_angle)
    east = -math.cos(declination) * math.sin(hour_angle)
    north = math.cos(phi) * math.sin(declination) - math.sin(phi) * math.cos(declination) * math.cos(hour_angle)
    return math.degrees(math.acos(up)), math.degrees(math.atan2(east, north)) % 360


def _stamp(when: datetime) -> str:
    return when.strftime("%Y%m%dT%H%M%S")
