"""Makes text from data sets and parameter files safe to print on a terminal."""

from __future__ import annotations


def plain(text: str) -> str:
    r"""Replace every character of `text` that a terminal would act on, or not show, by an escape such as `\x1b`.

    Newlines, tabs and all characters that Unicode calls printable stay. Examples of replaced characters are the escape
    character of terminals, marks that reverse the direction of text, and lone surrogates, which no encoding can write.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
