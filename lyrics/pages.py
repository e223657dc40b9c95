"""HTML pages from templates: what strangers wrote is escaped, and a name that a template misses is an error."""

import functools
from pathlib import Path

import jinja2


@functools.cache
def template(path: Path) -> jinja2.Template:
    """Compiled once; may include its neighbours."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
