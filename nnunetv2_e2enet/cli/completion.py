"""``e2enet completion``."""

from __future__ import annotations

import argparse

import shtab

HELP = "print what makes your shell complete e2enet's commands and options"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "examples:\n"
        "  e2enet completion bash > ~/.local/share/bash-completion/completions/e2enet\n"
        "  e2enet completion zsh > FOLDER_IN_FPATH/_e2enet\n"
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def run(args: argparse.Namespace) -> int:
    from nnunetv2_e2enet.cli.main import build_parser

    print(shtab.complete(build_parser(), args.shell))
    return 0
