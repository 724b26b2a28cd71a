"""Explain and score the latents of sparse autoencoders, as a declarative Dagster pipeline."""
