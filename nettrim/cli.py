"""The ``nettrim`` command."""

import click

import nettrim
from nettrim.commands.bench import bench
from nettrim.commands.demo import demo
from nettrim.commands.prune import prune
from nettrim.commands.report import report
from nettrim.commands.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nettrim.__version__, prog_name="nettrim")
def main() -> None:
    """Post-training pruning of PyTorch networks by convex optimization, with a certificate.

    Exit codes: 0, done and every certificate holds; 1, something failed or does not hold; 2, the command line is wrong.
    """


for command in (prune, report, verify, bench, demo):
    main.add_command(command)
