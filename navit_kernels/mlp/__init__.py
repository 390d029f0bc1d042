"""The MLP of a block: up, activation and down, in which the activation costs no pass of its own."""

from .op import feed_forward

__all__ = ["feed_forward"]
