"""The two kinds of failure that the command line treats specially."""


class InputError(ValueError):
    """The user gave something unusable. The message says what was found, what was expected and what to do."""


class RetryableError(RuntimeError):
    """A failure that may pass by itself (a server that is down, a lock that is held): running again can help."""
