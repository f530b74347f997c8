"""The stage feed."""
