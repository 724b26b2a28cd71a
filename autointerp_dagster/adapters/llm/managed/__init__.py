"""Servers that a run starts and ends by itself."""
