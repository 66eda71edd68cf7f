"""What lies on disk: whole files, names that every system takes, hashes."""
