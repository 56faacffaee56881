"""The one error of checkpoint folders."""


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read as it is; the message names what, and what would help."""
