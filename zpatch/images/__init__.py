"""Lazy images, subjects and cohorts: from a box asked for to the chunks that cover it."""
