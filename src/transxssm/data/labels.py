"""The label of tokens that no loss counts, as transformers has it."""

IGNORED_LABEL = -100
