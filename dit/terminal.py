"""Text that comes from data or from somebody's YAML, made safe to print."""

from __future__ import annotations


def plain(text: str) -> str:
    r"""`text` with every character that a terminal would act on, or not show, as an escape such as `\x1b`.

    Lines and tabs stay. So do all characters that Unicode calls printable; among the others are the escape sequences of
    terminals, marks that reverse the order of what follows, and the halves of characters that no encoding can write.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )
