"""The face for Automatic1111 and its kin: adapters, tab, accordion and API over ``erase_core``."""
