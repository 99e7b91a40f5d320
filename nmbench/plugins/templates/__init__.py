"""The files that `nmbench new-plugin` writes; `%{name}` and its like are filled in by `nmbench.plugins.scaffold`."""
