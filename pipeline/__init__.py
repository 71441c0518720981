"""From cloud archives to aligned chips to batches: numpy, xarray, dask, Zarr and Ray Data; never torch."""
