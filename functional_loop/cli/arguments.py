"""What can be typed: the commands and their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.record import did_you_mean
from .usage import Parser

_TARGET = "module:name or file.py:name of a Loop, or of a function that makes one"
_TRUST = "import what run.json in the folder says was trained there, which runs its code: for folders of your own"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command and its options, by name.

    Raises:
        UsageError: there is no such command or option, or it is given a value that can't be.
    """
    parser = Parser("functional-loop", description="Train PyTorch models, and look into what was trained.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {add.__name__.removeprefix("_add_").replace("_", "-"): add(commands) for add in _COMMANDS}
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = added[options.command]
        flags = [flag for action in command._actions for flag in action.option_strings if flag.startswith("--")]
        command.error(f"unknown argument {unknown[0]}{did_you_mean(unknown[0], flags)}")
    return options


def _add_train(commands: Any) -> Parser:
    train = _command(
        commands,
        "train",
        "train a loop, or continue a run",
        "Train a loop, or continue the run in DIR from where it stopped. The same command continues a run. Ctrl-C, "
        "SIGTERM and SIGUSR1 save at the next batch and exit with 130, 143 and 138.",
    )
    _add_loop(train)
    train.add_argument("--run", metavar="DIR", type=Path, required=True, help="the folder of the run")
    train.add_argument("--every-steps", metavar="N", type=_positive, help="save every N batches, not only every epoch")
    train.add_argument("--max-steps", metavar="N", type=_positive, help="stop and save after the N-th batch of the run")
    train.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="continue in spite of a difference that was refused, by its name in the message, such as train/batch_size",
    )
    train.add_argument(
        "--requeue",
        metavar="COMMAND",
        help="run after SIGUSR1, when all is saved, such as scontrol requeue $SLURM_JOB_ID",
    )
    return train


def _add_dry_run(commands: Any) -> Parser:
    dry_run = _command(
        commands,
        "dry-run",
        "what a loop would do, without doing it",
        "Walk through a loop on tensors without values: shapes and dtypes at every stage, the number of steps, memory, "
        "and the size of a checkpoint. Exits with 1 if the loop can't be run.",
    )
    _add_loop(dry_run)
    dry_run.add_argument("--real-batch", action="store_true", help="also train and validate on one batch for real")
    return dry_run


def _add_loop(command: Parser) -> None:
    command.add_argument("target", metavar="TARGET", help=_TARGET)
    command.add_argument("--seed", metavar="N", type=int, default=0, help="everything random is a function of it (0)")
    command.add_argument("--epochs", metavar="N", type=_natural, help="in place of the loop's own number of epochs")
    command.add_argument("--overfit", metavar="K", type=_positive, help="train on the first K batches, over and over")


def _add_verify(commands: Any) -> Parser:
    verify = _command(
        commands,
        "verify",
        "train again what lies between the checkpoints of a run, and compare",
        "Train again from every checkpoint in DIR to the next, and compare the bits, leaf by leaf. Nothing is written. "
        "Exits with 0 if they are the same, with 1 if they differ.",
    )
    verify.add_argument("folder", metavar="DIR", type=Path, help="the folder of a run, or of its checkpoints")
    verify.add_argument("target", metavar="TARGET", nargs="?", help=_TARGET)
    verify.add_argument("--trust", action="store_true", help=_TRUST)
    verify.add_argument("--from-start", action="store_true", help="also from the start to the first checkpoint")
    return verify


def _add_diff(commands: Any) -> Parser:
    diff = _command(
        commands,
        "diff",
        "the leaves in which two checkpoints differ",
        "Print the leaves in which two checkpoints differ, with the largest absolute difference and the distance in "
        "units of the last place. Exits with 0 if they are the same, with 1 if they differ.",
    )
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), type=Path, help="a checkpoint, or a folder for its newest")
    return diff


def _add_inspect(commands: Any) -> Parser:
    inspect = _command(
        commands,
        "inspect",
        "what is in a checkpoint",
        "Print the place in the run, the scores, and a tree of names, shapes, dtypes and sizes.",
    )
    inspect.add_argument("file", metavar="FILE", type=Path, help="a checkpoint, or a folder for its newest")
    return inspect


def _add_bisect(commands: Any) -> Parser:
    bisect = _command(
        commands,
        "bisect",
        "where two runs part",
        "Find the first step and the leaves at which two runs part, from their checkpoints, and by training again "
        "between two of them. Exits with 0 if the runs are the same, with 1 if they part.",
    )
    for name in ("a", "b"):
        bisect.add_argument(name, metavar=f"DIR_{name.upper()}", type=Path, help="the folder of a run")
    bisect.add_argument("--target", metavar="TARGET", help=_TARGET)
    bisect.add_argument("--target-b", metavar="TARGET", help="of the second run, if it is another")
    bisect.add_argument("--trust", action="store_true", help=_TRUST)
    return bisect


def _add_export(commands: Any) -> Parser:
    export = _command(
        commands,
        "export",
        "write a checkpoint for other tools",
        "Write the network of a checkpoint to a safetensors file, or network and optimizer to a file for torch.load: a "
        "dict of their state_dict().",
    )
    export.add_argument("file", metavar="FILE", type=Path, help="a checkpoint, step-....safetensors")
    export.add_argument("out", metavar="OUT", type=Path, help="a new file, .safetensors or .pt")
    return export


_COMMANDS = (_add_train, _add_dry_run, _add_verify, _add_diff, _add_inspect, _add_bisect, _add_export)


def _command(commands: Any, name: str, help: str, description: str) -> Parser:
    command: Parser = commands.add_parser(name, allow_abbrev=False, help=help, description=description)
    return command


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)
