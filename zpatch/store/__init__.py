"""The Zarr store: its records, how it is written, committed and verified."""
