"""The stage read: patches and sampled centres, compared with other libraries."""
