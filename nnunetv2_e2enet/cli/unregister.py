"""``e2enet unregister``."""

from __future__ import annotations

import argparse

from nnunetv2_e2enet import registration

HELP = "remove what `e2enet register` wrote"


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """The command has no arguments."""


def run(_args: argparse.Namespace) -> int:
    nnunet = registration.find_any_nnunet()
    removed = registration.unregister(nnunet)
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print(f"not registered with nnU-Net {nnunet.version} in {nnunet.folder}")
    return 0
