"""What converting raises; ferrotype.errors draws the whole tree."""

from ..errors import FerrotypeError, printable

LONGEST = 1000  # letters of a message


class ConvertError(FerrotypeError):
    """The checkpoint or an option does not work; the message says what to do."""


class OptionError(ConvertError):
    """Options that do not go together."""


class CheckpointError(ConvertError):
    """The checkpoint is damaged, incomplete or of a kind that is not supported.

    The message is one short line that can be printed, whatever the file's names hold.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 4 :]}"
        super().__init__(printable(message))
