"""The command line: a subcommand per verb, each parses, calls one function and prints.

Data goes to stdout, progress to stderr; `--json` prints exactly one JSON object. Exit 0: done,
1: one line `error: ...` and nothing half-written, 2: usage.
"""

from typing import Any

import click
import wrapt

from skimlm import __version__
from skimlm.cli.compress import compress, export, finetune
from skimlm.cli.errors import Commands, open_streams
from skimlm.cli.run import evaluate, generate, inspect
from skimlm.cli.serve import serve
from skimlm.cli.skill import skill
from skimlm.cli.tools import bench, cache, demo, info


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skimlm")
def main() -> None:
    """Compress a language model to any bit width or file size, on this machine."""
    open_streams()
    wrapt.register_post_import_hook(_quiet, "transformers.utils.logging")


def _quiet(logging: Any) -> None:
    """Have transformers say errors only."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


for _command in (
    compress,
    evaluate,
    generate,
    finetune,
    export,
    inspect,
    skill,
    serve,
    demo,
    bench,
    info,
    cache,
):
    main.add_command(_command)
