"""The evidence for what the documentation says of speed and quality: benchmarks and studies, and the commands that run them.

It stands beside the package `transxssm`, which knows nothing of it, and is what the extra `lab` is for.
"""
