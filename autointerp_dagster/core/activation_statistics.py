"""How often, how strongly, on which tokens and where each latent fires, from sorted non-zeros."""
