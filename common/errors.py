"""What ends a script with one line for its user."""

LONGEST_WORD = 300
LONGEST_LINE = 1500


class UserError(Exception):
    """A fault the user can mend: one line that names the flag or the file, what is wrong and what to do.

    Long values are shortened.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` without line breaks, and without the middle of what nobody reads to its end."""
    words = [_without_middle(word, LONGEST_WORD) for word in text.split()]
    return _without_middle(" ".join(words), LONGEST_LINE)


def _without_middle(text: str, longest: int) -> str:
    """`text` of at most `longest` characters: its beginning and its end."""
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[3 - longest // 2 :]}"
