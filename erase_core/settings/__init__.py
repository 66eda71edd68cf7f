"""What was asked for: validated settings, the texts in them, model families, layers."""
