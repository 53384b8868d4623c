"""Layers: one concept a file, each with its forward and its hand-derived backward in one class."""
