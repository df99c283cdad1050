"""Image sources, uint8 images on disk, and the latents that training reads."""
