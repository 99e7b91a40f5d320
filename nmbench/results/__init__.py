"""The run directory, its records, and the tables and frames made of them."""

from nmbench.results.files import FileCheckpoints, MemoryCheckpoints, load_masks, pack, save_masks, unpack
from nmbench.results.format import Record
from nmbench.results.labels import Meaning, meanings, repeat_command, run_command
from nmbench.results.mask_overlap import mask_overlap
from nmbench.results.pareto import COSTS, cost_of, front_of, loss_of
from nmbench.results.precision import decimals
from nmbench.results.ranking import file_name, named_seeds, pattern_of
from nmbench.results.rendering import render
from nmbench.results.results import Results, load_results
from nmbench.results.standing import Standing, standings
from nmbench.results.table import in_order, over_seeds
from nmbench.results.undone import asked_methods, undone_lines
from nmbench.sources import ValueRecord

__all__ = [
    "COSTS",
    "FileCheckpoints",
    "Meaning",
    "MemoryCheckpoints",
    "Record",
    "Results",
    "Standing",
    "ValueRecord",
    "asked_methods",
    "cost_of",
    "decimals",
    "file_name",
    "front_of",
    "in_order",
    "load_masks",
    "load_results",
    "loss_of",
    "mask_overlap",
    "meanings",
    "named_seeds",
    "over_seeds",
    "pack",
    "pattern_of",
    "render",
    "repeat_command",
    "run_command",
    "save_masks",
    "standings",
    "undone_lines",
    "unpack",
]
