"""``python -m tg_tinker.server``: the server as a child process of the program that uses it."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from pathlib import Path

from tg_tinker import home
from tg_tinker.errors import InvalidRequestError
from tg_tinker.server import process
from tg_tinker.server.settings import LOCAL_TENANT, Settings

KEY_VARIABLE = "TG_TINKER_EMBEDDED_KEY"


def main() -> None:
    """Serve on loopback, under the key in the environment, until the parent ends."""
    parser = argparse.ArgumentParser(prog="python -m tg_tinker.server", description=__doc__)
    parser.add_argument("--home", type=Path, default=None, help="folder for models, keys, checkpoints and logs")
    parser.add_argument("--parent", type=int, default=None, help="process id whose end ends this server")
    parser.add_argument("--port", type=int, default=0, help="0 lets the system choose")
    arguments = parser.parse_args()
    key = os.environ.pop(KEY_VARIABLE, "")
    if not key:
        parser.error(f"{KEY_VARIABLE} is not set: it holds the key that clients must show")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = Settings(
        home=home.folder(arguments.home),
        port=arguments.port,
        keys={key: LOCAL_TENANT},
        require_key=True,
        parent=arguments.parent,
    )
    try:
        process.run(settings)
    except InvalidRequestError as error:
        sys.exit(f"the server cannot run: {error}")  # the log's end is what the program shows
    gc.freeze()  # or the interpreter, at its end, would go through torch's million objects for seconds


if __name__ == "__main__":
    main()
