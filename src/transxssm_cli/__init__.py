"""The command `transxssm`.

It stands outside the package `transxssm` because importing that imports torch and transformers, to register the model with the
Auto classes: seconds that `--help` and a press of the tab key must not cost. Every command imports what it needs inside itself.
"""
