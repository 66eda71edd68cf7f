"""Fake of k-diffusion, as far as Automatic1111's samplers use it."""
