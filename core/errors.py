"""What a user, a file or a plugin can cause: one sentence each that says what, why and what to do."""


class PlexorError(Exception):
    """Base of every error whose message is meant for the user; the command line prints it without a traceback."""


class ConfigError(PlexorError):
    """A setting is unknown, out of range or contradicts another."""


class RequestError(PlexorError):
    """One request cannot be served; the engine goes on. `field` names the offending parameter, where there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(PlexorError):
    """A checkpoint is missing, damaged, hostile or does not fit its architecture."""


class PluginError(PlexorError):
    """A plugin is missing, broken or in conflict with another."""


class CapacityError(PlexorError):
    """Memory does not suffice for what was asked."""
