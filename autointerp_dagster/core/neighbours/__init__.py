"""Which latents of a layer are near each other."""
