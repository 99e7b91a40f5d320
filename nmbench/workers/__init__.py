"""Rows of one run made by several processes: of this machine, of a cluster, or started by hand."""
