"""NIfTI -> store -> NIfTI."""
