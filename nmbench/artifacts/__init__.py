"""Checkpoints and mask files, whoever wrote them: read, checked, compared, made.

`reading.open_artifact` turns a path into an `Artifact`: matrices by layer, each read a few rows at a time. All formats
meet there, so that `validation`, `difference` and methods that import masks see one thing. `decoder_scope` says which
matrices have to be N:M, `group_counts` counts groups, `export` writes a folder that transformers loads.
"""

from nmbench.artifacts.kept_masks import Kept, files_digest, open_masks

__all__ = ["Kept", "files_digest", "open_masks"]
