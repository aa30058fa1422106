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


# ---------------------------------------------------------------- out of GPU memory

ALLOCATION_FAILED = ("out of memory", "ALLOC_FAILED")  # torch's and CUDA's words; those of cuBLAS and cuDNN
# All of it may change when a run is resumed; --lora_rank and --use_8bit_adam may not.
OUT_OF_MEMORY_ADVICE = (
    "end what else is on this GPU, lower --resolution, or use --quantize nf4;"
    " --resume_from_checkpoint latest takes all of these"
)


class OutOfMemory(UserError):
    """GPU memory is used up, and there is no leaner way left to try."""

    def __init__(self, doing: str, advice: str = OUT_OF_MEMORY_ADVICE) -> None:
        super().__init__(f"out of GPU memory {doing}: {advice}")


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that GPU memory is used up: not every library raises torch's own class of RuntimeError."""
    if isinstance(error, OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)
