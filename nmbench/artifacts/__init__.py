"""Checkpoints and mask files of any tool: read, checked, compared, made.

`reading.open_artifact` turns a path into an `Artifact`: matrices by layer, each read a few rows at a time. All formats
give this one type, so that `validation`, `difference` and methods that import masks need no code per format.
`decoder_scope` selects the matrices that have to be N:M, `group_counts` counts groups, `export` writes a folder that
transformers loads.
"""

from nmbench.artifacts.kept_masks import Kept, files_digest, open_masks
from nmbench.artifacts.row_origin import row_record

__all__ = ["Kept", "files_digest", "open_masks", "row_record"]
