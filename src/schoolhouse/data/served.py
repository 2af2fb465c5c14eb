"""How one row is taught: everything that decides what it becomes, and the row's way through it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schoolhouse.config import Model, Recipe, Rows
from schoolhouse.data import encode, formats, tokens, turns
from schoolhouse.data.template import Template, compile_template, template_source
from schoolhouse.data.tokens import Stops
from schoolhouse.types import Conversation, EncodedRow, Origin, Turn, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Serving:
    """How a model is served: hashable and small, so that worker processes can build their own."""

    directory: Path
    """The model's directory; only its tokenizer's files are read."""
    chat_template: str | None
    template_arguments: str
    """JSON of the recipe's `model.template_arguments`."""
    stop_tokens: tuple[str, ...]
    today: datetime.date
    """The day that a template which prints the date prints."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What of a conversation is taught."""

    supervise: turns.Supervise
    max_tokens: int
    too_long: encode.TooLong


@dataclass(frozen=True, slots=True)
class Served:
    """A model's tokenizer, template and stop tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    stops: Stops

    def prompt(self, conversation: Conversation, messages: int) -> str:
        """The text shown before the assistant writes message number `messages` (counted from 0)."""
        shown = conversation.messages[:messages]
        return self.template.render(shown, conversation.tools, conversation.origin, to_answer=True)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text alone to ids."""
        return tokens.tokenize(self.tokenizer, texts)

    def to_turns(self, conversation: Conversation, supervise: turns.Supervise) -> tuple[Turn, ...]:
        """The supervised turns of a conversation."""
        return turns.to_turns(conversation, self.template, self.stops.texts, supervise)

    def to_row(
        self, conversation: Conversation, taught: Sequence[Turn], rules: Rules, tokenize: encode.Tokenize
    ) -> EncodedRow:
        """The examples of a conversation's turns, with the verdict on it."""
        examples, cut = encode.to_examples(
            taught, tokenize, self.stops.ids, conversation.origin,
            max_tokens=rules.max_tokens, too_long=rules.too_long,
        )
        return EncodedRow(conversation, _verdict(taught, len(examples)), tuple(taught), examples, cut)

    def encode(self, row: Mapping[str, Any], rows: Rows, origin: Origin, rules: Rules) -> EncodedRow | None:
        """One raw row all the way; None where the user's own function dropped it."""
        conversation = formats.to_conversation(dict(row), rows, origin)
        if conversation is None:
            return None
        return self.to_row(conversation, self.to_turns(conversation, rules.supervise), rules, self.tokenize)


def serving(model: Model, directory: Path, today: datetime.date | None = None) -> Serving:
    """How the recipe's model is served from its directory."""
    return Serving(
        directory, model.chat_template, json.dumps(model.template_arguments), model.stop_tokens,
        today or datetime.date.today(),
    )


def rules(recipe: Recipe) -> Rules:
    """What the recipe teaches of a conversation."""
    return Rules(recipe.data.supervise, recipe.max_tokens, recipe.data.too_long)


@functools.lru_cache(maxsize=4)
def load(serving: Serving) -> Served:
    """Load the tokenizer and compile the template; once for each process."""
    tokenizer = tokens.load_tokenizer(serving.directory)
    source = template_source(serving.chat_template, tokenizer.chat_template, str(serving.directory))
    variables = {**tokenizer.special_tokens_map, **json.loads(serving.template_arguments)}
    stops = tokens.stop_tokens(serving.directory, tokenizer, serving.stop_tokens)
    return Served(tokenizer, compile_template(source, variables, serving.today), stops)


def _verdict(taught: Sequence[Turn], examples: int) -> Verdict:
    if any(turn.prefilled for turn in taught):
        return "prefilled"
    return "split" if examples > 1 else "one"
