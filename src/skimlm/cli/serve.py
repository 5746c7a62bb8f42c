"""serve: a model and a folder of skills behind OpenAI's HTTP interface."""

import os
from pathlib import Path
from typing import Any

import click

from skimlm.cli.options import DEVICE, POSITIVE, REVISION, THREADS
from skimlm.errors import SkimError

KEY = "SKIMLM_API_KEY"


@click.command()
@click.argument("model")
@click.option("--skills", type=click.Path(path_type=Path), metavar="DIR", help="Skills to offer.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--name", help="What clients call the model.  [default: its folder's name]")
@click.option("--api-key", help=f"Ask clients for it.  [default: ${KEY}]")
@click.option("--rows", type=POSITIVE, default=16, show_default=True, help="Answers at a time.")
@click.option("--queue", type=POSITIVE, default=64, show_default=True, help="More that may wait.")
@click.option("--max-tokens", type=POSITIVE, help="Of one answer; default: what fits the model.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.001), default=600.0, show_default=True,
    help="Seconds for one answer.",
)  # fmt: skip
@REVISION
@DEVICE
@THREADS
def serve(
    model: str,
    skills: Path | None,
    host: str,
    port: int,
    name: str | None,
    api_key: str | None,
    revision: str | None,
    device: str,
    **limits: Any,
) -> None:
    """Serve a model: OpenAI's chat and text completions, with skills, and a page to chat on."""
    try:
        import uvicorn

        from skimlm.serve import start
    except ImportError as error:
        raise SkimError(f"serve needs {error.name}: pip install 'skimlm[serve]'") from None

    key = api_key or os.environ.get(KEY) or None
    made, about = start.make(model, name, skills, host, key, revision, device, **limits)
    click.echo(f"http://{host}:{port}  {about}", err=True)
    uvicorn.run(made, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10,
                server_header=False)  # fmt: skip
