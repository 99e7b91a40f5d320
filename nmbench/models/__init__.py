"""The dense model: its blocks and prunable layers, and how its weights are kept, restored and moved."""

from nmbench.models.bundle import Bundle
from nmbench.models.discovery import Anatomy, Weight, anatomy_of

__all__ = ["Anatomy", "Bundle", "Weight", "anatomy_of"]
