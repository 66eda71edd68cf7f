"""Fake of ``modules.paths``."""

data_path = models_path = ""
