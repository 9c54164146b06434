"""The package's error about input that cannot be used."""


class E2ENetError(ValueError):
    """Bad input, said in one line: what was found, what was expected, what to do.

    The console commands print the message alone, without a traceback.
    """
