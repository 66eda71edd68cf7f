"""Fake of Classic's ``ldm_patched``."""
