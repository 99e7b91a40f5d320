"""A kit for testing pruning methods: Hypothesis strategies for patterns, weights and statistics.

Needs the package `hypothesis` (`pip install "nmbench[test]"`). Import what is needed from its modules.
"""
