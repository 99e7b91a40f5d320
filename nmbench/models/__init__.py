"""The dense model: its blocks and prunable layers, and how its weights are kept, restored and moved."""

from nmbench.models.auto_class import auto_class
from nmbench.models.bundle import Bundle
from nmbench.models.discovery import Anatomy, Weight, anatomy_of
from nmbench.models.packed_windows import ignoring_packed_windows
from nmbench.models.stored_names import StoredNames

__all__ = ["Anatomy", "Bundle", "StoredNames", "Weight", "anatomy_of", "auto_class", "ignoring_packed_windows"]
