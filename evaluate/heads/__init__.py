"""Heads trained on stored features: the only place of this stage that may import torch, and never an encoder."""
