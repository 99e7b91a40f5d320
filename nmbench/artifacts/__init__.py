"""Checkpoints and mask files, whoever wrote them: read, checked, compared, made.

`reading.open_artifact` turns a path into an `Artifact`: matrices by layer, each read a few rows at a time. All formats
meet there, so that `validation`, `difference` and methods that import masks see one thing. `decoder` says which
matrices have to be N:M, `counting` counts groups, `export` writes a folder that transformers loads.
"""
