"""`nmbench reproduce`: published tables as data, the run that makes them again, and the verdict on every figure.

`tables/` holds one TOML file for every published table. `table` reads and checks one, `catalogue` finds it by name,
`masks` brings published mask files, `specification` turns a table into an ordinary `RunSpec`, and `verdicts` compares
the records of the run with the published figures.
"""
