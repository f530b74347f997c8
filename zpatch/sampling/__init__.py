"""Where patches are taken."""
