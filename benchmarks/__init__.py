"""What zpatch is measured by, and against whom; `python -m benchmarks` runs it, README.md explains it."""
