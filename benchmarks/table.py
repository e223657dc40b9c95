"""A generated table in a document."""

from pathlib import Path

from lyrics.errors import InputError


def write_table(path: Path, name: str, markdown: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a document.

    Raises:
        InputError: the document does not hold the two markers, once each and in this order.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text()
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise InputError(f"{path} must hold {start} and, after it, {end}, once each; put them where the table belongs")
    before, rest = text.split(start)
    path.write_text(f"{before}{start}\n{markdown.strip()}\n{end}{rest.split(end)[1]}")
