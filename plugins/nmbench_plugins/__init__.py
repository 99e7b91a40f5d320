"""The methods, models, data sets, metrics and reporters of nmbench, as ordinary plugins.

Each module is an entry point of the group `nmbench` and imports only public names of `nmbench`, like any third-party
plugin.
"""
