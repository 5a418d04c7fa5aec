"""The error that means: you typed something that cannot be."""


class UsageError(Exception):
    """Wrong usage: exit code 2."""
