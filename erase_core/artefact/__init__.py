"""What a run leaves: the erasure, its record, its file and its report."""
