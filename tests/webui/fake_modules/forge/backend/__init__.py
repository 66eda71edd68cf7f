"""Fake of Forge's ``backend``."""
