"""The error for a user's mistake."""


class InputError(ValueError):
    """A user's mistake. The message says what is wrong, where, and what to do. `__main__` exits with 2."""
