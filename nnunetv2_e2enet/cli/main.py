"""Entry point of ``e2enet``."""

from __future__ import annotations

import argparse
import os
import select
import sys
import textwrap
from collections.abc import Sequence
from io import TextIOWrapper
from types import ModuleType
from typing import Any, TextIO

import shtab

from nnunetv2_e2enet import __version__
from nnunetv2_e2enet.cli import (
    compare,
    crossval,
    demo,
    export,
    info,
    phantom,
    plan,
    predict,
    profile,
    register,
    topology,
    unregister,
)
from nnunetv2_e2enet.errors import E2ENetError

COMPLETION = "print the completion script of a shell"
COMPLETION_EXAMPLES = """\
examples:
  e2enet completion bash > ~/.local/share/bash-completion/completions/e2enet
  e2enet completion zsh > FOLDER_IN_FPATH/_e2enet
"""
COMMANDS: dict[str, ModuleType] = {
    "register": register,
    "unregister": unregister,
    "info": info,
    "plan": plan,
    "crossval": crossval,
    "export": export,
    "predict": predict,
    "phantom": phantom,
    "profile": profile,
    "compare": compare,
    "topology": topology,
    "demo": demo,
}


class Parser(argparse.ArgumentParser):
    """Options are written out, and an argument that is unknown is an error of the subcommand that it was given to."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Options that are joined with a number, as in ``-d4``.

        argparse's ``allow_abbrev=False`` leaves abbreviations of ``-device``, of which ``-d`` would be one.
        """
        matches = super()._get_option_tuples(option_string)
        return [match for match in matches if option_string.removeprefix(match[1]).isdigit()]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but nothing may be left unknown."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="e2enet", description="E2ENet for nnU-Net v2.")
    parser.add_argument("--version", action="version", version=f"nnunetv2-e2enet {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        description = textwrap.fill(module.HELP, 80)
        subparser = subparsers.add_parser(
            name, help=module.HELP, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(subparser)
    completion = subparsers.add_parser(
        "completion",
        help=COMPLETION,
        description=COMPLETION,
        epilog=COMPLETION_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shtab.add_argument_to(completion, "shell", help="shell (default: bash)", parent=parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; without one, show the help.

    Returns:
        0 if all went well, 1 for bad input (said in one message on standard error), 130 after Ctrl-C. Also 1, without a
        message, where standard output is a pipe that nobody reads any more, as in ``e2enet info | head -1``.

    Raises:
        SystemExit: argparse ends the command (0 after help, else 2), or SIGTERM ends a prediction (143).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that its encoding lacks, as in files on Windows
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:  # as where it was closed before
                sys.stdout.flush()
    except BrokenPipeError:
        if not _is_closed_pipe(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        code: int = COMMANDS[args.command].run(args)
        return code
    except E2ENetError as error:
        print(f"e2enet {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"e2enet {args.command}: interrupted", file=sys.stderr)
        return 130


def _is_closed_pipe(stream: TextIO) -> bool:
    """Whether a stream writes into a pipe without a reader; the pipe to a process of a pool may break as well."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
