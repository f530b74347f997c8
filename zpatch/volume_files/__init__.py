"""NIfTI files, in and out.

In reading order::

    byte_streams   the door to gzip and isal
    signature      the first bytes of a file: NIfTI-1 or -2, or another kind of file
    nifti_affine   which affine of a header counts: sform, qform or voxel sizes
    nifti_header   the door to nibabel: what a header says, and voxels streamed slab by slab
    nifti_writer   raw headers, copied or built, and voxels streamed after them
"""
