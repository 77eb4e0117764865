"""The one exception of the harness: a step that failed, in words for a person."""


class HarnessError(Exception):
    """A step failed or took too long. The text says which one and shows the end of its output."""
