"""Code that runs inside the sandbox. It imports the standard library and nothing else."""
