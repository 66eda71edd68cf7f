"""Fake of Forge's ``modules_forge``."""
