"""What is asked of a host's model, and what rides on its forward and backward."""
