"""Results that were measured here or imported, in one SQLite file; nothing in it is ever changed.

A run is written in one transaction when it ends and, so that not even a killed process loses what
it measured, once in a while before.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import FerrotypeError
from .results import Result, dumps, loads

APPLICATION = 0x46455252  # "FERR", in the file's header
VERSION = 1
ROOM = 1 << 20  # bytes that a result may take
WAIT = 10.0  # seconds for another process that writes
TABLE = """
    create table results (
        id text primary key, created text not null, machine text not null, json text not null
    )
"""


class StoreError(FerrotypeError):
    """The file of results cannot be read or written, or is something else."""


class Store:
    """The results in a file, which is made when the first is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self) -> None:
        """Raise StoreError, before anything is measured, if no result could be kept."""
        with self._open(create=True) as connection:
            [[state]] = connection.execute("pragma quick_check(1)")
            if state != "ok":
                raise sqlite3.DatabaseError("malformed")
            connection.execute("begin immediate")  # nobody else holds it
            connection.execute("rollback")
            # Only a write tells: a file may be opened on a disk that is full or read-only.
            with tempfile.TemporaryFile(dir=self.path.parent) as file:
                file.write(bytes(ROOM))
                file.flush()

    def put(self, result: Result) -> None:
        """Keep a result; of the same id, as while it is measured, the newest."""
        row = (result.id, result.created, result.machine.name, dumps(result))
        with self._open(create=True) as connection:
            connection.execute("insert or replace into results values (?, ?, ?, ?)", row)

    def add(self, result: Result) -> bool:
        """Keep one from elsewhere; False if it is there.  StoreError if another has its id."""
        known = next(iter(self._select("where id = ?", result.id)), None)
        if known is None:
            self.put(result)
            return True
        if known != loads(dumps(result)):  # which rounds
            raise StoreError(f"{self.path} has another result of the id {result.id}: it is kept, "
                             "the new one is not")  # fmt: skip
        return False

    def all(self) -> list[Result]:
        """Every result, oldest first."""
        return list(self._select("order by created, id"))

    def last(self) -> Result:
        """The newest; StoreError if there is none."""
        found = list(self._select("order by created desc, id limit 1"))
        if not found:
            raise StoreError(f"{self.path} has no results: measure with `ferrotype bench BUNDLE`")
        return found[0]

    def find(self, prefix: str) -> Result:
        """The one whose id begins so; StoreError if none or several do."""
        escaped = "".join(c for c in prefix.lower() if c in "0123456789abcdef")
        found = list(self._select("where id glob ? limit 2", f"{escaped}*")) if escaped else []
        if escaped != prefix.lower() or not found:
            raise StoreError(f"{prefix[:60]!r} is neither a file nor the id of a result in "
                             f"{self.path}: `ferrotype bench list` shows them")  # fmt: skip
        if len(found) > 1:
            raise StoreError(f"{prefix!r} begins the ids of several results: give more of it")
        return found[0]

    def _select(self, rest: str, *values: str) -> Iterator[Result]:
        if not self.path.exists():
            return
        with self._open(create=False) as connection:
            rows = connection.execute(f"select id, json from results {rest}", values).fetchall()
        for id, text in rows:
            yield loads(text, f"{self.path}: result {id}")

    @contextmanager
    def _open(self, create: bool) -> Iterator[sqlite3.Connection]:
        """A connection to a file that is ours, in which every statement is a transaction."""
        connection: sqlite3.Connection | None = None
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "rwc" if create else "ro"
            address = f"{self.path.absolute().as_uri()}?mode={mode}"
            connection = sqlite3.connect(address, WAIT, isolation_level=None, uri=True)
            self._check_ours(connection)
            yield connection
        except sqlite3.Error as error:
            raise StoreError(self._explain(error)) from None
        except OSError as error:
            raise StoreError(
                f"{self.path} cannot be written ({error.strerror or error}): make room, or pass "
                "--store with another place, or --no-store"
            ) from None
        finally:
            if connection is not None:
                connection.close()

    def _check_ours(self, connection: sqlite3.Connection) -> None:
        [[application]] = connection.execute("pragma application_id")
        [[version]] = connection.execute("pragma user_version")
        if application == APPLICATION:
            if version != VERSION:
                raise StoreError(f"{self.path} is of version {version}, this ferrotype reads "
                                 f"{VERSION}: pass another --store")  # fmt: skip
            return
        [[tables]] = connection.execute("select count(*) from sqlite_master")
        if application or tables:
            raise StoreError(f"{self.path} is a database of something else: pass another --store")
        connection.execute("begin immediate")
        connection.execute(TABLE)
        connection.execute(f"pragma application_id = {APPLICATION}")
        connection.execute(f"pragma user_version = {VERSION}")
        connection.execute("commit")

    def _explain(self, error: sqlite3.Error) -> str:
        text = str(error)
        if "malformed" in text or "not a database" in text:
            return (f"{self.path} is damaged or no database ({text}): it is left as it is; move it "
                    "away or pass another --store")  # fmt: skip
        if "full" in text or "disk I/O" in text:
            return f"{self.path} cannot be written ({text}): make room, or pass another --store"
        if "locked" in text:
            return f"{self.path} is in use by another process ({text}): try again"
        return f"{self.path} cannot be opened or written ({text}): pass another --store"
