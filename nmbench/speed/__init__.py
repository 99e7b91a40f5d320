"""How fast 2:4 sparse products really are: `nmbench speed`.

`measure` prunes, proves, converts and times; `whole` times a model as a whole; `gpu` is the only file that knows CUDA;
`report` is what people read.
"""
