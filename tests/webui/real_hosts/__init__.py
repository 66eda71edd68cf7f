"""Tests in a real Automatic1111, Forge, Forge Classic or reForge; skipped without one."""
