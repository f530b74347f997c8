"""Files of volumes: NIfTI, in and out; NRRD and MetaImage, in.

In reading order::

    byte_streams   the door to gzip, zlib and isal
    signature      the first bytes of a file: NIfTI-1 or -2, or another kind of file
    voxel_parts    voxels in one file or in several, read as one stream
    volume_file    a volume in a file: what its header says, and its voxels streamed slab by slab
    nifti_affine   which affine of a NIfTI header counts: sform, qform or voxel sizes
    nifti_header   the door to nibabel: headers of NIfTI files
    nifti_writer   raw headers, copied or built, and voxels streamed after them
    text_header    what the text headers of NRRD and MetaImage share: lines, fields, LPS -> RAS
    data_files     the files of voxels that a text header names
    metaimage      headers of MetaImage files
    nrrd           headers of NRRD files
    formats        which files are of which format, read by what, and the files that belong to one
"""
