"""The one exception that means "the user can mend this": its message is a single clear line."""


class UserError(ValueError):
    """What is wrong, where, and what to write instead. The command line prints it without a traceback."""
