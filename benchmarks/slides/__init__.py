"""The stage slides: patches, sweeps and predictions of a slide in JPEG tiles, compared with other readers."""
