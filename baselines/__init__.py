"""The detectors that the papers begin with, each whole and runnable."""
