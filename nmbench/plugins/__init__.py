"""Finding, checking and registering plugins; hooks and events; writing a new one."""

from nmbench.plugins.events import Progress
from nmbench.plugins.hookspecs import HOOKS_VERSION, hookimpl
from nmbench.plugins.loading import Plugins, load_plugins
from nmbench.plugins.registry import Register

__all__ = ["HOOKS_VERSION", "Plugins", "Progress", "Register", "hookimpl", "load_plugins"]
