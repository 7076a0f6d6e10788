"""The error that a person at the command line is meant to read."""


class UserError(ValueError):
    """One clear line: the thing, the value found, the remedy. The command line prints it and exits with 2."""
