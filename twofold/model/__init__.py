"""Frozen values shared by every room. Nothing here does I/O, reads a clock or draws random numbers."""
