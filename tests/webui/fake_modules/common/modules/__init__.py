"""Fake of the hosts' package ``modules``."""
