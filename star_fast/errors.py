"""The one exception that users are meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a job that cannot go on: one line that says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
