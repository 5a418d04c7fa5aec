"""What can go wrong in any layer."""


class Interrupted(Exception):
    """Ctrl-C: the work stopped where it can go on, and what was done is on the disk; the message says where."""
