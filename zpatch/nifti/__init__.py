"""NIfTI files, in and out."""
