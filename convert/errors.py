"""What converting raises; ferrotype.errors draws the whole tree."""

from ..errors import FerrotypeError


class ConvertError(FerrotypeError):
    """The checkpoint or an option does not work; the message says what to do."""


class OptionError(ConvertError):
    """Options that do not go together."""


class CheckpointError(ConvertError):
    """The checkpoint is damaged, incomplete or of a kind that is not supported.

    The message is one short line that can be printed, whatever the file's names hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, longest: int = 1000) -> str:
    """Text with what cannot be printed escaped, and its middle left out if it is too long."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
