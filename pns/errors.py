"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Wrong input: the message is one line that names what is wrong, where, and the way out. The command
    prints it and exits with 2."""
