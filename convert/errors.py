"""What converting raises; ferrotype.errors draws the whole tree."""

from ..errors import FerrotypeError


class ConvertError(FerrotypeError):
    """The checkpoint or an option does not work; the message says what to do."""


class OptionError(ConvertError):
    """Options that do not go together."""


class CheckpointError(ConvertError):
    """The checkpoint is damaged, incomplete or of a kind that is not supported."""
