"""The stage space."""
