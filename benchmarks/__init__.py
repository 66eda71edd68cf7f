"""What the pack costs and how well it works, measured."""
