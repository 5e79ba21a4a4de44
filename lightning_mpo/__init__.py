"""lightning-mpo: RL post-training of language models in which what counts as one action is a choice.

Importing the package imports nothing heavy; take what you need from its modules (`lightning_mpo.functional.actions`, …).
"""

__version__ = "0.1.0"
