"""The stage predict."""
