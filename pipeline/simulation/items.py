"""STAC items shaped like the Planetary Computer's: the same property names, asset keys and places of `proj:*`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from pipeline.bands import NATIVE_GROUPS, OPTICAL_BANDS, RADAR_BANDS, RESOLUTION_M, SCENE_CLASSIFICATION
from pipeline.simulation.frame import Frame
from pipeline.simulation.scenes import (
    LabelScene,
    OpticalScene,
    RadarScene,
    Scene,
    absolute_orbit,
    relative_orbit,
    sun_position,
)

Json = dict[str, Any]

COG_TYPE: Final = "image/tiff; application=geotiff; profile=cloud-optimized"

# common name, full name, centre wavelength and width in micrometres
EO_BANDS: Final[dict[str, tuple[str, str, float, float]]] = {
    "B01": ("coastal", "Coastal aerosol", 0.443, 0.027),
    "B02": ("blue", "Blue", 0.49, 0.098),
    "B03": ("green", "Green", 0.56, 0.045),
    "B04": ("red", "Red", 0.665, 0.038),
    "B05": ("rededge", "Vegetation red edge 1", 0.704, 0.019),
    "B06": ("rededge", "Vegetation red edge 2", 0.74, 0.018),
    "B07": ("rededge", "Vegetation red edge 3", 0.783, 0.028),
    "B08": ("nir", "NIR", 0.842, 0.145),
    "B8A": ("rededge", "Vegetation red edge 4", 0.865, 0.033),
    "B09": ("", "Water vapor", 0.945, 0.026),
    "B11": ("swir16", "SWIR (1.6)", 1.61, 0.143),
    "B12": ("swir22", "SWIR (2.2)", 2.19, 0.242),
}
WORLDCOVER_CLASSES: Final = {
    10: ("Tree cover", "006400"),
    20: ("Shrubland", "FFBB22"),
    30: ("Grassland", "FFFF4C"),
    40: ("Cropland", "F096FF"),
    50: ("Built-up", "FA0000"),
    60: ("Bare / sparse vegetation", "B4B4B4"),
    70: ("Snow and ice", "F0F0F0"),
    80: ("Permanent water bodies", "0064C8"),
    90: ("Herbaceous wetland", "0096A0"),
    95: ("Mangroves", "00CF75"),
    100: ("Moss and lichen", "FAE6A0"),
}
_SCL_PERCENTAGES: Final = {
    "s2:dark_features_percentage": (2,),
    "s2:cloud_shadow_percentage": (3,),
    "s2:vegetation_percentage": (4,),
    "s2:not_vegetated_percentage": (5,),
    "s2:water_percentage": (6,),
    "s2:unclassified_percentage": (7,),
    "s2:medium_proba_clouds_percentage": (8,),
    "s2:high_proba_clouds_percentage": (9,),
    "s2:thin_cirrus_percentage": (10,),
    "s2:snow_ice_percentage": (11,),
    "eo:cloud_cover": (8, 9, 10),
}
_EXTENSIONS: Final = "https://stac-extensions.github.io/{}/schema.json"


def optical_item(scene: OpticalScene, hrefs: dict[str, Path], classes: NDArray[np.uint8]) -> Json:
    """A `sentinel-2-l2a` item.

    Args:
        scene: What was seen.
        hrefs: File per band, and of the scene classification.
        classes: (row, column) scene classification, from which the percentages are counted.
    """
    outline = scene.frame.footprint(scene.swath and scene.swath.clip(scene.frame, scene.ground.plane))
    return {
        **_frame_of_item(scene.id, "sentinel-2-l2a", outline, ("eo/v1.0.0", "sat/v1.0.0", "projection/v1.0.0")),
        "properties": _optical_properties(scene, outline, classes),
        "assets": {band: _optical_asset(scene.frame, band, path) for band, path in hrefs.items()},
    }


def radar_item(scene: RadarScene, hrefs: dict[str, Path]) -> Json:
    """A `sentinel-1-rtc` item; `hrefs` holds one file per polarisation."""
    outline = scene.frame.footprint(scene.swath and scene.swath.clip(scene.frame, scene.ground.plane))
    extensions = ("sar/v1.0.0", "sat/v1.0.0", "projection/v1.0.0", "raster/v1.1.0")
    return {
        **_frame_of_item(scene.id, "sentinel-1-rtc", outline, extensions),
        "properties": _radar_properties(scene),
        "assets": {band.lower(): {"href": str(hrefs[band]), **radar_asset(band)} for band in RADAR_BANDS},
    }


def label_item(scene: LabelScene, path: Path) -> Json:
    """An `esa-worldcover` item: valid for a year, so without a `datetime` of its own."""
    extensions = ("projection/v1.0.0", "grid/v1.1.0", "raster/v1.1.0", "classification/v1.0.0")
    return {
        **_frame_of_item(scene.id, "esa-worldcover", scene.frame.footprint(), extensions),
        "properties": {
            "datetime": None,
            "start_datetime": "2021-01-01T00:00:00Z",
            "end_datetime": "2021-12-31T23:59:59Z",
            "created": "2022-10-21T07:35:40Z",
            "mission": "sentinel-1, sentinel-2",
            "platform": "sentinel-1a, sentinel-1b, sentinel-2a, sentinel-2b",
            "instruments": ["c-sar", "msi"],
            "description": "Simulated land cover in the form of the ESA WorldCover product at 10m resolution",
            "proj:epsg": 4326,
            "grid:code": f"ESAWORLDCOVER-{scene.tile}",
            "esa_worldcover:product_tile": scene.tile,
            "esa_worldcover:product_version": "2.0.0",
        },
        "assets": {"map": {"href": str(path), **label_asset(), **_projection(scene.frame)}},
    }


def optical_asset(band: str) -> Json:
    """What is the same of every item's asset of a band."""
    resolution = resolution_m(band)
    asset: Json = {"gsd": float(resolution), "type": COG_TYPE, "roles": ["data"]}
    if band == SCENE_CLASSIFICATION:
        return {**asset, "title": "Scene classfication map (SCL)"}  # spelt as the archive spells it
    common_name, title, centre, width = EO_BANDS[band]
    label = f"Band {band[1:].lstrip('0')} - {title}"
    named: Json = {"name": band, "common_name": common_name} if common_name else {"name": band}
    described = {**named, "description": label, "center_wavelength": centre, "full_width_half_max": width}
    return {**asset, "title": f"{label} - {resolution}m", "eo:bands": [described]}


def radar_asset(band: str) -> Json:
    """What is the same of every item's asset of a polarisation."""
    received = {"V": "vertical", "H": "horizontal"}[band[1]]
    return {
        "type": COG_TYPE,
        "roles": ["data"],
        "title": f"{band}: vertical transmit, {received} receive",
        "description": f"Terrain-corrected gamma naught, vertical transmit and {received} receive, linear power.",
        "raster:bands": [{"nodata": -32768, "data_type": "float32", "spatial_resolution": 10.0}],
    }


def label_asset() -> Json:
    """What is the same of every item's map."""
    return {
        "type": COG_TYPE,
        "roles": ["data"],
        "title": "Land Cover Classes",
        "raster:bands": [{"nodata": 0, "sampling": "area", "data_type": "uint8", "spatial_resolution": 10}],
        "classification:classes": [
            {"value": value, "description": name, "color-hint": colour}
            for value, (name, colour) in WORLDCOVER_CLASSES.items()
        ],
    }


def resolution_m(band: str) -> int:
    """Pixel side of a Sentinel-2 asset."""
    groups = {name: group for group, names in NATIVE_GROUPS.items() for name in names}
    return RESOLUTION_M[groups.get(band, "scl")]


def collection_of(scene: Scene) -> str:
    """Id of the collection that a scene belongs to."""
    kinds = {OpticalScene: "sentinel-2-l2a", RadarScene: "sentinel-1-rtc", LabelScene: "esa-worldcover"}
    return kinds[type(scene)]


def asset_bands(scene: Scene) -> tuple[str, ...]:
    """Names of the rasters of a scene."""
    kinds = {OpticalScene: (*OPTICAL_BANDS, SCENE_CLASSIFICATION), RadarScene: RADAR_BANDS, LabelScene: ("map",)}
    return kinds[type(scene)]


def _frame_of_item(item_id: str, collection: str, outline: BaseGeometry, extensions: tuple[str, ...]) -> Json:
    """All but properties and assets."""
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [_EXTENSIONS.format(extension) for extension in extensions],
        "id": item_id,
        "collection": collection,
        "geometry": shapely.geometry.mapping(shapely.set_precision(outline, 1e-8)),
        "bbox": [round(value, 8) for value in outline.bounds],
        "links": [{"rel": "collection", "type": "application/json", "href": f"../../collections/{collection}.json"}],
    }


def _optical_properties(scene: OpticalScene, outline: BaseGeometry, classes: NDArray[np.uint8]) -> Json:
    counts = np.bincount(classes.ravel(), minlength=12)
    seen = max(int(counts[1:].sum()), 1)
    orbit = relative_orbit(scene.platform, scene.sensed)
    zenith, azimuth = sun_position(scene.sensed, outline.centroid.x, outline.centroid.y)
    made = scene.id.rsplit("_", 1)[1]
    flight = f"A{absolute_orbit(scene.platform, scene.sensed):06d}"
    baseline = f"N{scene.baseline}"
    return {
        "datetime": _iso(scene.sensed, ".024000"),
        "platform": f"Sentinel-2{scene.platform[-1]}",
        "constellation": "Sentinel 2",
        "instruments": ["msi"],
        "proj:epsg": scene.frame.epsg,
        "sat:orbit_state": "descending",
        "sat:relative_orbit": orbit,
        "s2:mgrs_tile": scene.tile,
        "s2:processing_baseline": scene.baseline,
        "s2:product_type": "S2MSI2A",
        "s2:product_uri": scene.id.replace(f"_R{orbit:03d}", f"_{baseline.replace('.', '')}_R{orbit:03d}") + ".SAFE",
        "s2:granule_id": f"{scene.platform}_OPER_MSI_L2A_TL_SIM_{made}_{flight}_T{scene.tile}_{baseline}",
        "s2:datastrip_id": f"{scene.platform}_OPER_MSI_L2A_DS_SIM_{made}_S{scene.sensed:%Y%m%dT%H%M%S}_{baseline}",
        "s2:datatake_id": f"G{scene.platform}_{scene.sensed:%Y%m%dT%H%M%S}_{flight[1:]}_{baseline}",
        "s2:datatake_type": "INS-NOBS",
        "s2:generation_time": _iso(datetime.strptime(made, "%Y%m%dT%H%M%S"), ".775234"),
        "s2:mean_solar_zenith": round(zenith, 6),
        "s2:mean_solar_azimuth": round(azimuth, 6),
        "s2:reflectance_conversion_factor": 1.0,
        "s2:nodata_pixel_percentage": _percent(counts[0], classes.size),
        "s2:degraded_msi_data_percentage": 0.0,
        "s2:saturated_defective_pixel_percentage": 0.0,
        **{name: _percent(sum(counts[list(codes)]), seen) for name, codes in _SCL_PERCENTAGES.items()},
    }


def _radar_properties(scene: RadarScene) -> Json:
    left, bottom, right, top = scene.frame.bounds
    height, width = scene.frame.height_px, scene.frame.width_px
    return {
        "datetime": _iso(scene.sensed + (scene.ended - scene.sensed) / 2),
        "start_datetime": _iso(scene.sensed),
        "end_datetime": _iso(scene.ended),
        "platform": f"SENTINEL-{scene.platform[1:]}",
        "constellation": "Sentinel-1",
        "proj:epsg": scene.frame.epsg,
        "proj:bbox": [left, bottom, right, top],
        "proj:shape": [height, width],
        "proj:transform": list(scene.frame.transform),
        "s1:shape": [width, height],
        "s1:resolution": "high",
        "s1:datatake_id": str(int(scene.id.split("_")[-2], 16)),
        "s1:slice_number": "7",
        "s1:total_slices": "15",
        "s1:orbit_source": "RESORB",
        "s1:processing_level": "1",
        "s1:product_timeliness": "Fast-24h",
        "s1:instrument_configuration_ID": "7",
        "sat:orbit_state": "ascending" if scene.ascending else "descending",
        "sat:absolute_orbit": absolute_orbit(scene.platform, scene.sensed),
        "sat:relative_orbit": relative_orbit(scene.platform, scene.sensed),
        "sat:platform_international_designator": {"S1A": "2014-016A", "S1B": "2016-025A"}[scene.platform],
        "sar:product_type": "GRD",
        "sar:polarizations": list(RADAR_BANDS),
        "sar:instrument_mode": "IW",
        "sar:frequency_band": "C",
        "sar:center_frequency": 5.405,
        "sar:observation_direction": "right",
        "sar:looks_range": 5,
        "sar:looks_azimuth": 1,
        "sar:looks_equivalent_number": 4.4,
        "sar:resolution_range": 20,
        "sar:resolution_azimuth": 22,
        "sar:pixel_spacing_range": 10,
        "sar:pixel_spacing_azimuth": 10,
    }


def _optical_asset(frame: Frame, band: str, path: Path) -> Json:
    coarse = frame.coarser(resolution_m(band) // 10)
    return {"href": str(path), **_projection(coarse), "proj:bbox": list(coarse.bounds), **optical_asset(band)}


def _projection(frame: Frame) -> Json:
    return {"proj:shape": [frame.height_px, frame.width_px], "proj:transform": list(frame.transform)[:6]}


def _percent(count: int, total: int) -> float:
    return round(100.0 * int(count) / total, 6)


def _iso(when: datetime, fraction: str | None = None) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S") + (fraction or f".{when.microsecond:06d}") + "Z"
