"""``e2enet register``."""

from __future__ import annotations

import argparse

from nnunetv2_e2enet import registration

HELP = "make nnU-Net's commands find the E2ENet trainers and planners"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Writes one small module into each of two folders of the installed nnU-Net.\nRun it again at any time."
    parser.add_argument(
        "--experiments",
        action=argparse.BooleanOptionalAction,
        help="also the trainers of the paper's experiments (default: unchanged; a first registration leaves them out)",
    )


def run(args: argparse.Namespace) -> int:
    nnunet = registration.find_nnunet()
    written = registration.register(nnunet, args.experiments)
    for path in written:
        print(f"wrote {path}")
    if not written:
        print(f"already registered with nnU-Net {nnunet.version} in {nnunet.folder}")
    return 0
