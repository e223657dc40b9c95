"""What must be remembered of a whole data set (ids, pictures, boxes), on disk: memory does not grow with the data.

Both are private temporary SQLite databases, gone when they are closed. Keys are hashed, so that an endless one costs
no more than another.
"""

import hashlib
import sqlite3
from collections.abc import Iterator


def _hash(keys: tuple[object, ...]) -> bytes:
    text = "\x1f".join(map(str, keys))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _database(schema: str) -> sqlite3.Connection:
    database = sqlite3.connect("", isolation_level=None)  # "" is a temporary file, deleted on closing
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-8192;" + schema)
    return database


class Index:
    """A dictionary from keys of any printable parts to strings."""

    def __init__(self) -> None:
        self._database = _database("CREATE TABLE entry (key BLOB PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, *key: object) -> str | None:
        row = self._database.execute("SELECT value FROM entry WHERE key = ?", (_hash(key),)).fetchone()
        return row and row[0]

    def add(self, *key: object, value: str = "") -> bool:
        """Remember `value` unless the key is there; whether it was new."""
        return self._database.execute("INSERT OR IGNORE INTO entry VALUES (?, ?)", (_hash(key), value)).rowcount == 1

    def __contains__(self, key: object) -> bool:
        return self.get(key) is not None

    def close(self) -> None:
        self._database.close()


class Groups:
    """Lists of strings by key."""

    def __init__(self) -> None:
        self._database = _database(
            "CREATE TABLE member (number INTEGER PRIMARY KEY, key BLOB, value TEXT);CREATE INDEX by_key ON member (key)"
        )

    def add(self, *key: object, value: str) -> None:
        self._database.execute("INSERT INTO member (key, value) VALUES (?, ?)", (_hash(key), value))

    def of(self, *key: object, limit: int) -> Iterator[str]:
        """At most `limit` members, in the order in which they were added."""
        query = "SELECT value FROM member WHERE key = ? ORDER BY number LIMIT ?"
        for (value,) in self._database.execute(query, (_hash(key), limit)):
            yield value

    def close(self) -> None:
        self._database.close()
