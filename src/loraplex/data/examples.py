"""One row of data in the only shape the rest of loraplex knows, and the raw row it is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraplex.errors import UserError, nearest


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One row, whatever its file looked like.

    The text a model sees is prompt + completion, with nothing between them: a space that belongs there stands at the
    start of the completion and of every choice.
    """

    # Text, or the chat messages before the completion.
    prompt: str | tuple[Message, ...]
    # The text to learn; for multiple choice the text of the right option.
    completion: str
    # The texts of all options, each as a completion; empty when the row is not multiple choice.
    choices: tuple[str, ...] = ()
    # The index of the right option in `choices`.
    answer: int | None = None
    task: str = ""
    # "file:line", for messages.
    source: str = ""
    # The other text of a pair that is classified; None where one text is.
    second: str | None = None
    # What is asked, without the words that a form puts around it; empty where the row says it nowhere else.
    instruction: str = ""

    @property
    def asked(self) -> str:
        """Return the instruction, else the prompt; of a chat the user's turns."""
        if self.instruction:
            return self.instruction
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(turn.content for turn in self.prompt if turn.role == "user")


@dataclass(frozen=True)
class Row:
    """A row as it was read: its fields, and where it stands for error messages."""

    fields: Mapping[str, object]
    source: str

    def value(self, name: str) -> object:
        """Return the field `name`.

        Raises:
            UserError: the field is absent or null.
        """
        found = self.fields.get(name)
        if found is None:
            raise self.error(f"field '{name}' is missing.{nearest(name, self.fields)} The row has {self.names()}")
        return found

    def text(self, name: str) -> str:
        """Return the field `name`, which has to be a string.

        Raises:
            UserError: the field is absent, null, or not a string.
        """
        found = self.value(name)
        if not isinstance(found, str):
            raise self.error(f"field '{name}' has to be text, not {found!r}")
        return found

    def names(self) -> str:
        """Return the names of the fields in words."""
        return ", ".join(f"'{name}'" for name in self.fields) or "no fields"

    def error(self, message: str) -> UserError:
        """Return an error about this row that starts with its place."""
        return UserError(f"{self.source}: {message}")
