"""What the faces of several hosts share beside the engine; none of it imports a host."""
