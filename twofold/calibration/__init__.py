"""Measuring a running engine and fitting an engine profile to what was measured."""
