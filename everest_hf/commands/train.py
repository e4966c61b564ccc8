"""everest-hf train: a run of train_accelerate.py, on one process here, or on several by Accelerate's launcher."""

import argparse
import copy
import logging
import os
import signal
from importlib.util import find_spec

from .options import PROGRAM, add_command, print_error

# What Accelerate's launcher calls the ways of running several processes.
SEVERAL = ("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "tpu")
# Variables that the launcher would set for one process, and that a run reads.
VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEBUG_MODE", "CUDA_VISIBLE_DEVICES")


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "train",
        run,
        "Pre-train, fine-tune or probe EVEREST on video files; without arguments, the quickstart.",
        f"{PROGRAM} train --task finetune --train VIDEOS --val VIDEOS --output_dir runs/mine",
    )
    parser.passes_on = True  # the options of a recipe are known only once the package is loaded


def run(args: argparse.Namespace) -> int:
    """Run the training and return its exit code."""
    from ..training.options import OneLineParser, parse_command_line

    parser = OneLineParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    _add_launch_options(parser)
    known, rest = parser.parse_known_args(args.arguments)
    parse_command_line(rest, program=f"{PROGRAM} train", parent=parser)  # what is wrong is said before anything starts
    chosen = vars(known)
    if chosen.get("num_processes", 1) < 1:
        raise ValueError(f"--num_processes is {chosen['num_processes']}; it must be at least 1")
    launch, environment = _plan_launch(chosen, rest)
    if environment is None:
        return _launch(launch)
    os.environ.update(environment)
    from train_accelerate import main

    main(rest)
    return 0


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    """Add what `accelerate launch` has under the same names; its other options can be in its configuration file."""
    group = parser.add_argument_group("Processes")
    group.add_argument("--num_processes", type=int, metavar="INT", help="training processes [one a GPU]")
    group.add_argument(
        "--mixed_precision", choices=("no", "bf16", "fp16"), metavar="STR", help="no, bf16 or fp16 [no]"
    )
    group.add_argument(
        "--config_file", metavar="STR", help="what `accelerate config` wrote [where it writes by default]"
    )


def _plan_launch(chosen: dict, rest: list[str]) -> tuple[argparse.Namespace, dict[str, str] | None]:
    """Return the arguments of Accelerate's launcher, and for a run on one process the variables that it would set."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    script = find_spec("train_accelerate")
    assert script is not None
    assert script.origin is not None
    options = [f"--{name}={value}" for name, value in chosen.items()]
    args = launch.launch_command_parser().parse_args(["--quiet", *options, script.origin, *rest])
    logging.getLogger(launch.__name__).setLevel(logging.ERROR)  # no warning of each default that it takes
    plan, *_ = launch._validate_launch_command(copy.copy(args))
    if any(getattr(plan, name) for name in SEVERAL):
        return args, None
    if chosen.get("num_processes", 1) > 1:
        args.multi_gpu = True  # which Accelerate takes for several processes on CPUs too
        return args, None
    if plan.dynamo_backend != "no":
        return args, None
    variables = prepare_simple_launcher_cmd_env(plan)[1]
    return args, {name: variables[name] for name in VARIABLES if variables.get(name, "False") not in ("False", "no")}


def _launch(args: argparse.Namespace) -> int:
    """Run Accelerate's launcher and return the exit code of the process that failed first, or 0.

    When a process fails, the launcher stops the others by SIGTERM; their exit codes say nothing.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..training.guard import STOPPED

    try:
        launch_command(args)
    except ChildFailedError as error:
        failures = list(error.failures.values())
        own = [failure for failure in failures if failure.exitcode not in (-signal.SIGTERM, STOPPED)]
        failure = min(own or failures, key=lambda failure: failure.timestamp)
        if failure.exitcode < 0:
            print_error(f"a training process ended: {failure.message}")  # it could not say so itself
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
