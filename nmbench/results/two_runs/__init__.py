"""Two run directories side by side: what changed between them, by how much, and whether it is more than noise."""

from nmbench.results.two_runs.comparing import Comparison, compared_runs
from nmbench.results.two_runs.rendering import comparison_json, comparison_text, verdict_line

__all__ = ["Comparison", "compared_runs", "comparison_json", "comparison_text", "verdict_line"]
