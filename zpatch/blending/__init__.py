"""Overlapping patches into one volume."""
