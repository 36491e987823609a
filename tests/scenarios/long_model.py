"""The catalogue against its model for as long as you like: other stories each time, and a failure made small.

    python -m tests.scenarios.long_model [--stories 500] [--steps 60] [--database sqlite|postgresql]

Prints the steps of the smallest story that fails, if one does. PostgreSQL is started on its own and removed at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from replica.db import schema
from replica.db.engine import Database
from tests.replica.catalog import test_the_model as model
from tests.servers import PostgreSQL


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    said = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="replica-model-") as directory:
        server = PostgreSQL() if said.database == "postgresql" else None
        try:
            if server is not None:
                server.start()
                server.execute("CREATE DATABASE model")
            url = f"sqlite:///{Path(directory)}/model.db" if server is None else server.url("model")
            database = Database(url)
            schema.migrate(database)
            done = model.drive(model.one_database(database), said.stories, said.steps, anew=True)
            database.close()
        finally:
            if server is not None:
                server.remove()
    print(f"{said.stories} stories of {said.steps} steps, {dict(done)}: the catalogue is what the model says")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
