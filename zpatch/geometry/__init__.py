"""Where voxels lie: boxes, patch grids, affines, orientations, padding; no files, no torch."""
