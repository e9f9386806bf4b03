"""The command `transxssm`.

It is outside the package `transxssm`, whose import loads torch and transformers to register the model with the Auto classes. That takes
seconds, which `--help` and tab completion must not cost. Every command imports what it needs inside its function.
"""
