"""The ``e2enet`` command: one module a subcommand, each with HELP, add_arguments and run."""
