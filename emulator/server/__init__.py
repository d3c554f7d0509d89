"""The engine model on the real clock, behind vLLM's HTTP surface."""
