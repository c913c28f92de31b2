"""The detectors that the papers build on, each complete and runnable."""
