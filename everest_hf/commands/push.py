"""everest-hf push: publish a checkpoint on the Hub."""

import argparse

from .options import PROGRAM, add_command


def add_parser(commands) -> None:
    parser = add_command(
        commands,
        "push",
        run,
        "Publish a checkpoint on the Hub: weights, configuration, code, processor, model card, and the run's records.",
        f"{PROGRAM} push runs/quickstart/finetune your-name/your-model",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of a model, or of a run, whose result is published"
    )
    parser.add_argument("repo", metavar="REPO", help="repository on the Hub, user/name; created where there is none")
    parser.add_argument("--private", action="store_true", help="create a repository that nobody else sees")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created where there is none [main]")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")


def run(args: argparse.Namespace) -> int:
    """Publish a checkpoint and print its address."""
    from .. import hub

    print(hub.push(args.checkpoint, args.repo, private=args.private, revision=args.revision, message=args.message))
    return 0
