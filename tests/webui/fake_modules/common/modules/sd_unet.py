"""Fake of ``modules.sd_unet``."""

current_unet = None
