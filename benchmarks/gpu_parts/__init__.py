"""The parts of `benchmarks/gpu.py`, each with a `main(run)`."""
