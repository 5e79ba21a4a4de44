"""Exact resumes: the state in checkpoints, and the checks of a checkpoint."""
