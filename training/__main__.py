"""`python -m training COMMAND`: build-data, pretrain, evaluate, demo, figure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ironclip.errors import IronclipError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build-data", help="build a data set from its packages")
    build.add_argument("data", choices=["demo"])
    build.add_argument("--out", type=Path, default=Path("data/demo"))
    build.add_argument("--size", type=int, default=96, help="side of the stored pictures in pixels")
    train = commands.add_parser("pretrain", help="contrastive pre-training from scratch; resumes by itself")
    train.add_argument("--config", required=True, help="a name in training/configs, or a .toml file")
    train.add_argument("--run", type=Path, default=None, help="run folder (default runs/NAME)")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors raised on purpose are printed in one line and give exit status 1."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "build-data":
            from training.emoji.build import build_data

            build_data(arguments.out, arguments.size)
        elif arguments.command == "pretrain":
            from training.config import load_config
            from training.pretrain import PretrainConfig, pretrain

            config = load_config(PretrainConfig, arguments.config, arguments.overrides)
            print(pretrain(config, arguments.run or Path("runs") / config.name))
    except IronclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
