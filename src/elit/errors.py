"""The one exception that a wrong input raises."""


class ElitError(ValueError):
    """A wrong input, told in one sentence: what was wrong, where, and what to do.

    The command line prints the sentence and exits with code 2 (``--debug`` shows the traceback).
    """
