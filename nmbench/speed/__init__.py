"""Measured times of 2:4 sparse products against dense ones: `nmbench speed`.

`measure` prunes, proves, converts and times; `whole_model` times a model as a whole, `prefill` the parts of a prefill,
`alternatives` products in other forms; `gpu` holds all CUDA code behind the protocol of `hardware`; `preload` loads
another cuSPARSELt; `report` and `prefill_report` hold the figures and print them.
"""
