"""Providers with a lifetime that assets ask for models, coders, LLMs and the store."""
