"""Why a sample cannot be used."""

from __future__ import annotations

# In the order in which they are logged.
REASONS = (
    "missing_image",
    "unreadable_image",
    "image_size",
    "empty_text",
    "too_long",
    "invalid_record",
)


class SampleError(ValueError):
    """A sample that cannot be used.

    Args:
        message: What is wrong with it.
        reason: "missing_image", "unreadable_image", "image_size", "empty_text", "too_long" or
            "invalid_record".
    """

    def __init__(self, message: str, reason: str = "invalid_record") -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: Exception) -> str:
    """The reason of any error that a sample may end with."""
    if isinstance(error, FileNotFoundError):
        return "missing_image"
    return error.reason if isinstance(error, SampleError) else "invalid_record"


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}")
