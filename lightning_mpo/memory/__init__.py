"""Memory of a run: measured by phase, counted by part, and spared by the optimiser."""
