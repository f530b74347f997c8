"""The stage convert."""
