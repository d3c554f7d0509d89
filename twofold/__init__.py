"""Twofold: router and autoscaler control plane for fleets of vLLM workers."""

__version__ = "0.1.0"
