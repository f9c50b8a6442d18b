"""The exceptions that users are meant to see: one line each, whatever the names in it hold."""

from __future__ import annotations


def printable(text: object) -> str:
    """`text` on one line that no terminal can misread: control characters, line breaks and bytes that are no text
    (names of files may hold all of them) appear as backslash escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii") for char in text
    )


class UserError(Exception):
    """Bad input or a job that cannot go on: one line that says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with status 2.

    Attributes: of_one_rank (whether, of a job of several ranks, any rank that meets it says so; else rank 0 says it for
    all).
    """

    of_one_rank = True

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class ConfigError(UserError):
    """A setting or a field of a record contradicts another or cannot be read; the message names the field."""


class AgreedError(UserError):
    """An error that every rank of a job raises: rank 0 alone says it."""

    of_one_rank = False
