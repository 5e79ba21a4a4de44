"""The parts of `benchmarks/study.py`."""
