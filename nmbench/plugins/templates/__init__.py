"""The files that `nmbench new-plugin` writes; `nmbench.plugins.scaffold` replaces placeholders such as `%{name}`."""
