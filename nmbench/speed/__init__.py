"""Measured times of 2:4 sparse products against dense ones: `nmbench speed`.

`measure` prunes, proves, converts and times; `whole_model` times a model as a whole; `gpu` holds all CUDA code;
`report` holds the figures and prints them.
"""
