"""What a run needs to go on exactly: what checkpoints hold, and which of them a run may take."""
