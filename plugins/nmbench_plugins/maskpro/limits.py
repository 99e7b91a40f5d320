"""Limits that the options check before any tensor is there."""

MAX_GROUP = 32  # weights
