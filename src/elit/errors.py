"""The one exception that a wrong input raises, and how it quotes others."""


class ElitError(ValueError):
    """A wrong input, told in one sentence: what was wrong, where, and what to do.

    The command line prints the sentence and exits with code 2 (``--debug`` shows the traceback).
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, and the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
