"""Least squares: the optimal kept weights of a layer under a given mask, from sums over the layer's inputs.

`solver` holds the solution of one layer.
"""
