"""The one error that means "the request made no sense": the command line turns it into exit code 2."""


class InputError(ValueError):
    """A request that cannot be carried out as it stands.

    The message names the argument, echoes the value and gives the fix. Nothing has been written or lost when it is
    raised.
    """
