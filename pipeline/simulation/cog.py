"""Cloud-optimised GeoTIFFs as the archives write them: tiled, deflated, with overviews inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS

from pipeline.simulation.frame import Frame

BLOCK_PX = 512


def write_cog(path: Path, pixels: NDArray[np.generic], frame: Frame, *, nodata: float, classes: bool = False) -> None:
    """Write one band.

    Args:
        path: File to create; its folder is made.
        pixels: (row, column) of the frame.
        frame: Where they lie.
        nodata: Value of pixels without data.
        classes: Values are codes: overviews take the nearest, never a mean.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="COG",
        width=frame.width_px,
        height=frame.height_px,
        count=1,
        dtype=pixels.dtype,
        crs=CRS.from_epsg(frame.epsg),
        transform=frame.transform,
        nodata=nodata,
        compress="deflate",
        level=1,  # the noise in the last bits does not compress any better with more effort
        predictor="YES",
        blocksize=BLOCK_PX,
        overview_resampling="nearest" if classes else "average",
    ) as file:
        file.write(pixels, 1)
