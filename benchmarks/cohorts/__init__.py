"""The stage cohorts."""
