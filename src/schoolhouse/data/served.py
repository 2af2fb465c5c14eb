"""How one row is taught: everything that decides what it becomes, and the row's way through it."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schoolhouse import inert
from schoolhouse.config import Model, Recipe, Rows
from schoolhouse.data import encode, formats, tokens, turns, vision
from schoolhouse.data.template import Template, compile_template, template_source
from schoolhouse.data.tokens import Stops
from schoolhouse.data.vision import Sight
from schoolhouse.errors import DataError
from schoolhouse.types import Conversation, EncodedRow, Example, Origin, Picture, Turn, Verdict

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
    image_tokens: int | None = None
    """The recipe's `model.image_tokens`."""


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
    vocabulary: int | None = None
    """The number of the model's embeddings, where its configuration tells it."""
    sight: Sight | None = None
    """How the model sees; None for one that does not."""
    family: str | None = None
    """What the model's configuration calls its architecture."""

    def prompt(self, conversation: Conversation, messages: int) -> str:
        """The text shown before the assistant writes message number `messages` (counted from 0)."""
        return self.seen_prompt(conversation, messages)[0]

    def seen_prompt(self, conversation: Conversation, messages: int) -> tuple[str, tuple[Picture, ...]]:
        """That text with a place for each visual token, and the images it shows."""
        text = self.template.script(conversation).prompt(messages)
        if self.sight is None:
            vision.blind(conversation, self.family)
            return text, ()
        return self.sight.prompt(text, conversation.messages[:messages], str(conversation.origin))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text alone to ids."""
        return tokens.tokenize(self.tokenizer, texts)

    def to_turns(self, conversation: Conversation, supervise: turns.Supervise) -> tuple[Turn, ...]:
        """The supervised turns of a conversation."""
        if self.sight is None:
            vision.blind(conversation, self.family)
        written = turns.to_turns(conversation, self.template, self.stops, supervise)
        if self.sight is None:
            return written
        answers = [index for index, _ in turns.taught(conversation.messages, supervise)]
        return tuple(self.sight.shown(conversation, list(zip(answers, written, strict=True))))

    def to_rows(
        self, rows: Sequence[tuple[Conversation, Sequence[Turn]]], rules: Rules
    ) -> Iterator[EncodedRow | DataError]:
        """The examples of each conversation's turns with the verdict on it, or its fault; tokenized all together."""
        encoded = tokens.tokenize_turns(self.tokenizer, [taught for _, taught in rows])
        for (conversation, taught), ids in zip(rows, encoded, strict=True):
            try:
                yield self._row(conversation, taught, ids, rules)
            except DataError as error:
                yield error

    def _row(
        self, conversation: Conversation, taught: Sequence[Turn], ids: Sequence[encode.Ids], rules: Rules
    ) -> EncodedRow:
        examples, cut, longest = encode.to_examples(
            taught, ids, self.stops.ids, conversation.origin, max_tokens=rules.max_tokens, too_long=rules.too_long,
        )
        self._check_vocabulary(examples, conversation.origin)
        for example in examples if self.sight else ():
            self._check_places(example)
        return EncodedRow(conversation, _verdict(taught, len(examples)), tuple(taught), examples, cut, longest)

    def _check_vocabulary(self, examples: Sequence[Example], origin: Origin) -> None:
        """Each token must have an embedding: a tokenizer of another model may have more."""
        for example in examples if self.vocabulary is not None else ():
            largest = max(int(example.input_ids.max(initial=0)), int(example.labels[-1]))  # the only other token
            if largest >= self.vocabulary:
                text = self.tokenizer.decode([largest])
                raise DataError(
                    f"token {largest} ({text!r}) has no embedding: the tokenizer is another model's",
                    required=f"tokens below {self.vocabulary}, the vocab_size in config.json",
                    where=str(origin), remedy="put the model's own tokenizer files into its directory",
                )

    def _check_places(self, example: Example) -> None:
        """The text has as many visual tokens as the vision tower will make of the example's images."""
        places = int((example.input_ids == self.sight.token).sum())
        features = sum(picture.tokens for picture in example.vision)
        if places != features:
            raise DataError(
                f"{places} visual tokens in the text for {features} features", where=str(example.origin),
                required="as many tokens as features", remedy="check that tokenizer and model belong together",
            )

    def encode(self, row: Mapping[str, Any], rows: Rows, origin: Origin, rules: Rules) -> EncodedRow | None:
        """One raw row all the way; None where the user's own function dropped it."""
        conversation = formats.to_conversation(dict(row), rows, origin)
        if conversation is None:
            return None
        return self.encode_conversation(conversation, rules)

    def encode_conversation(self, conversation: Conversation, rules: Rules) -> EncodedRow:
        """The examples of one conversation; raises DataError where it cannot be taught."""
        encoded = next(self.to_rows([(conversation, self.to_turns(conversation, rules.supervise))], rules))
        if isinstance(encoded, DataError):
            raise encoded
        return encoded


def serving(model: Model, directory: Path, today: datetime.date | None = None) -> Serving:
    """How the recipe's model is served from its directory."""
    return Serving(
        directory, model.chat_template, json.dumps(model.template_arguments), model.stop_tokens,
        today or datetime.date.today(), model.image_tokens,
    )


def rules(recipe: Recipe) -> Rules:
    """What the recipe teaches of a conversation."""
    return Rules(recipe.data.supervise, recipe.max_tokens, recipe.data.too_long)


def files(serving: Serving) -> list[Path]:
    """Everything on the disk that decides what a row becomes."""
    template = [Path(serving.chat_template)] if serving.chat_template else []
    more = [path for name in tokens.MORE_FILES for path in sorted(serving.directory.glob(name))]
    return [*(serving.directory / name for name in tokens.FILES), *more, *template]


def load(serving: Serving) -> Served:
    """Load the tokenizer and compile the template; once for each process, and again when a file has changed."""
    stats = [path.stat() if path.is_file() else None for path in files(serving)]
    stamps = *(stat and (stat.st_mtime_ns, stat.st_size) for stat in stats), *inert.code(serving.directory).items()
    return _load(serving, stamps)


@functools.lru_cache(maxsize=4)
def _load(serving: Serving, _stamps: tuple) -> Served:
    tokenizer = tokens.load_tokenizer(serving.directory)
    own = tokens.own_template(serving.directory, tokenizer)
    source = template_source(serving.chat_template, own, str(serving.directory))
    variables = {**tokenizer.special_tokens_map, **json.loads(serving.template_arguments)}
    stops = tokens.stop_tokens(serving.directory, tokenizer, serving.stop_tokens)
    template = compile_template(source, variables, serving.today)
    sight = vision.sight(serving.directory, tokenizer, serving.image_tokens)
    vocabulary, family = tokens.vocabulary(serving.directory), vision.model_type(serving.directory)
    return Served(tokenizer, template, stops, vocabulary, sight, family)


def _verdict(taught: Sequence[Turn], examples: int) -> Verdict:
    if any(turn.prefilled for turn in taught):
        return "prefilled"
    return "split" if examples > 1 else "one"
