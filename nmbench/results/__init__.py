"""The run directory, its records, and the tables and frames made of them."""

from nmbench.results.files import FileCheckpoints, MemoryCheckpoints, load_masks, pack, save_masks, unpack
from nmbench.results.format import Record
from nmbench.results.results import Results, load_results
from nmbench.results.table import render

__all__ = [
    "FileCheckpoints",
    "MemoryCheckpoints",
    "Record",
    "Results",
    "load_masks",
    "load_results",
    "pack",
    "render",
    "save_masks",
    "unpack",
]
