"""An extension for the site's reference: where a docstring tells of parameters and fields one after the other ("model: ... plan:
...", each at the begin of a sentence), the page has them as a list."""

import re

import griffe


class Lists(griffe.Extension):
    """Rewrites docstrings of functions by their parameters, and those of classes by their attributes and parameters."""

    def on_function(self, *, func, **_):
        """A function or method."""
        _rewrite(func, [p.name for p in func.parameters])

    def on_class(self, *, cls, **_):
        """A class."""
        init = cls.members.get("__init__")
        names = [name for name, member in cls.members.items() if member.is_attribute]
        _rewrite(cls, [*names, *([p.name for p in init.parameters] if init is not None and init.is_function else [])])


def _rewrite(thing, names):
    if thing.docstring is None or not names:
        return
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    head = re.compile(rf"(?:^|(?<=[.\])] )|(?<=[.\])]\n))((?:{one})(?:, (?:{one}))*): ", re.M)
    paragraphs = []
    for text in re.split(r"\n\n+", thing.docstring.value):
        text = re.sub(r"(?<=[.\])])\s+(?=Raises:? )", "\n\n", text)
        for part in text.split("\n\n"):
            pieces = head.split(part)
            if len(pieces) == 1:
                paragraphs.append(part)
                continue
            paragraphs += [pieces[0].rstrip()] if pieces[0].strip() else []
            items = zip(pieces[1::2], pieces[2::2])
            paragraphs.append("\n".join(f"- **{name}**: {' '.join(said.split())}" for name, said in items))
    thing.docstring.value = "\n\n".join(paragraphs)
