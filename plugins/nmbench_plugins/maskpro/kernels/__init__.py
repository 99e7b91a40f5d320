"""The step of one layer as Triton programs: their launcher, the programs, and their reference in plain torch."""
