"""The two pluggy markers: `hookimpl` for plugin authors, `hookspec` for the core."""

import pluggy

hookspec = pluggy.HookspecMarker("plexor")
hookimpl = pluggy.HookimplMarker("plexor")
