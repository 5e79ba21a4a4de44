"""`lightning-mpo plan`: what a run will need of memory, before anything is loaded."""
