"""Turn a base language model into a reasoning model, in JAX.

Cold start (SFT, DPO), reinforcement learning with verifiable rewards, and many objectives at once.
"""

__version__ = "0.1.0"
