"""The recipe: every setting there is, its default and its unit. This file is the only schema.

Nothing rewrites a recipe. What follows from it (steps in total, warm-up steps, the run's directory)
is computed where it is needed, printed, and stored beside it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NaturalInt = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NaturalFloat = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, le=1, strict=True)]
Share = Annotated[float, Field(ge=0, lt=1, strict=True)]
Decay = Share
Switch = Annotated[bool, Field(strict=True)]


def _whole(value: object) -> object:
    """3.0 as 3: others write passes as fractions."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Section(BaseModel):
    """A frozen part of a recipe; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)


class Rows(Section):
    """How a row becomes a conversation. With none of these set, columns decide."""

    format: (
        Literal["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer"] | None
    ) = None
    """The form of the rows. Unset: recognised from the columns."""
    columns: dict[str, str] | None = None
    """Where the form's fields stand, e.g. `{question: extra_info.question}`; dots reach into nested values."""
    messages: list[dict[str, str]] | None = None
    """A template of the conversation, e.g. `[{role: user, content: "{question} Think."}, …]`; `{a.b}` is a column."""
    function: str | None = None
    """Your own `module:function`, called with a row (dict), returning `{"messages": […]}` or None to drop it."""
    image_root: str | None = None
    """The only folder that images may be read from; paths in rows are relative to it. Unset: the rows' own folder."""
    image_pixels: PositiveInt = 50_000_000
    """The most pixels of an image as it is stored; a larger one is refused by its header."""


class Source(Rows):
    """One place rows come from. Its row settings stand in front of those of `data`."""

    path: str
    """A `.jsonl`, `.ndjson` (either `.gz`), `.json`, `.parquet`, `.arrow`, `.csv` or `.tsv` file, a directory of such
    files, a saved data set (of either a split: `path:test`), `starter/…`, or a hub `name:config:split`."""
    limit: PositiveInt | None = None
    """Read only this many rows, from the beginning."""
    proportion: PositiveFloat | None = None
    """Its part in a mixture: 3 beside 1 makes three rows of four. As many rows are drawn as there are without taking
    one twice. Unset, for all sources: every row."""


def _source(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: object) -> object:
    return [value] if isinstance(value, str | dict) else value


AnySource = Annotated[Source, BeforeValidator(_source, json_schema_input_type=Source | str)]
_SourceList = Annotated[list[Source | str], Field(min_length=1)]
AnySources = Annotated[
    tuple[AnySource, ...], Field(min_length=1),
    BeforeValidator(_sources, json_schema_input_type=Source | str | _SourceList),
]
HeldOut = Annotated[float, Field(gt=0, lt=1, strict=True)]


def _sources_or_share(value: object) -> str:
    return "one-of-share" if isinstance(value, int | float) else "one-of-sources"


SourcesOrShare = Annotated[
    Annotated[AnySources, Tag("one-of-sources")] | Annotated[HeldOut, Tag("one-of-share")],
    Discriminator(_sources_or_share),
]


def _word_or_other(value: object) -> str:
    return "one-of-words" if isinstance(value, str) else "one-of-others"


CountOrAuto = Annotated[
    Annotated[PositiveInt, Tag("one-of-others")] | Annotated[Literal["auto"], Tag("one-of-words")],
    Discriminator(_word_or_other),
]
SwitchOrSelective = Annotated[
    Annotated[Switch, Tag("one-of-others")] | Annotated[Literal["selective"], Tag("one-of-words")],
    Discriminator(_word_or_other),
]


class Data(Rows):
    """What is taught."""

    train: AnySources
    """One source or a list of sources; a source is a path, or a mapping when it needs settings of its own."""
    limit: PositiveInt | None = None
    """Teach at most this many rows, drawn by the seed from all sources; a source's own limit takes its first ones."""
    validation: SourcesOrShare | None = None
    """Sources whose loss is measured during training; or the share of the rows of `train` that is held out for it, such
    as 0.05, drawn by the seed and the content, so that equal rows stand on the same side."""
    supervise: Literal["every", "last", "marked"] = "every"
    """Which assistant messages are learnt: all, the last one, or those that the data marks with a weight."""
    max_tokens: PositiveInt | None = None
    """The longest example, in tokens. Unset: `batch.tokens`."""
    too_long: Literal["error", "drop", "turns"] = "error"
    """What happens to a longer one: stop, drop the row, or cut whole turns from its end. All are counted."""
    on_error: Annotated[str, Field(pattern=r"^(stop|skip:\d{1,3}(\.\d+)?%)$")] = "stop"
    """What happens when rows are bad: stop, or set up to this share of them aside, e.g. `skip:0.1%`, in `bad.jsonl`."""
    workers: NaturalInt = 0
    """Processes that prepare the rows. 0: one for each core."""
    cache: str | None = None
    """Where prepared data is kept. Unset: `$XDG_CACHE_HOME/schoolhouse`."""

    @model_validator(mode="after")
    def _mixed(self) -> Data:
        held_out = self.validation if isinstance(self.validation, tuple) else ()
        for name, sources in (("train", self.train), ("validation", held_out)):
            if len({source.proportion is None for source in sources}) > 1:
                raise ValueError(f"either all sources of {name} have a proportion, or none")
        if self.bad_share > 1:
            raise ValueError(f"on_error is {self.on_error!r}: a share is at most 100%")
        return self

    @property
    def bad_share(self) -> float:
        """The share of the rows, from 0 to 1, that may be bad."""
        return 0.0 if self.on_error == "stop" else float(self.on_error[len("skip:"):-1]) / 100


class Model(Section):
    """Who is taught."""

    path: str
    """A hub id, a local directory in the hub's layout, or a starter student such as `starter/qwen3`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the matrix products run in. With bfloat16 the optimizer keeps float32 weights and float32 gradient sums."""
    chat_template: str | None = None
    """A Jinja file, or `plain` or `chatml`. Unset: the one that comes with the tokenizer."""
    new_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Tokens to add, e.g. `["<tool>", "</tool>"]`: the model is copied with rows for them, which are trained. With
    `lora`, name embeddings and head in `modules_to_save`; only a merged export can then be used elsewhere."""
    template_arguments: dict[str, bool | int | float | str] = {}
    """Further variables of the chat template, e.g. `{enable_thinking: false}`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer. Unset: the model's own generation configuration, else the tokenizer's end token."""
    image_tokens: PositiveInt | None = None
    """The most visual tokens of one image; larger images are shrunk. Unset: the limit of the model's own processor."""
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ()
    """Parts of a model that sees which are not trained: its vision tower, what joins the two, its language model."""
    activation_checkpointing: SwitchOrSelective = False
    """Keep only the input of each block and compute it again in backward: less memory, about a third more time. With
    `selective` results of attention are kept, too, so that long examples do not attend twice."""
    activation_offload: Switch = False
    """With activation_checkpointing: inputs of blocks lie in host memory till backward. CUDA."""
    compile: Switch = False
    """Each block by torch.compile, for any length; the first step waits for it. Needs a C++ compiler, or Triton."""
    liger: Switch = False
    """Liger's fused kernels for norms, rotary positions and gated layers; CUDA and `schoolhouse[liger]`."""
    float8: Switch = False
    """Matrix products of the blocks in float8, with a scale for every row; precision bfloat16, no lora, CUDA from
    compute capability 8.9 and `schoolhouse[float8]`."""

    @model_validator(mode="after")
    def _agreeing(self) -> Model:
        twice = [token for token in self.new_tokens if self.new_tokens.count(token) > 1]
        if twice:
            raise ValueError(f"new_tokens names {twice[0]!r} twice")
        if self.activation_offload and not self.activation_checkpointing:
            raise ValueError("activation_offload needs activation_checkpointing=true (or selective)")
        if self.float8 and self.precision != "bfloat16":
            raise ValueError("float8 needs precision=bfloat16")
        return self


class Lora(Section):
    """Low-rank adapters beside frozen weights, through PEFT; without this section the whole model is trained."""

    rank: PositiveInt = 16
    """Columns of the factors beside each matrix."""
    alpha: PositiveFloat = 32.0
    """The product of the factors is multiplied with alpha / rank."""
    dropout: Decay = 0.0
    """Share of an adapter's inputs that are left out at random while training."""
    targets: str | tuple[str, ...] = "all-linear"
    """`all-linear` (all but the head), a list of module names such as `[q_proj, v_proj]`, or a regex of whole names."""
    experts: Switch | None = None
    """Whether stacked experts of a mixture are adapted too; a mixture with experts must say so."""
    rslora: Switch = False
    """Multiply with alpha / sqrt(rank): large ranks learn as they should (rsLoRA)."""
    dora: Switch = False
    """Also learn the length of each row of a matrix (DoRA)."""
    base: Literal["stored", "nf4"] = "stored"
    """Frozen matrices beside adapters: as the model's files have them, or in 4 bits (`nf4`, QLoRA) by torchao,
    `schoolhouse[qlora]`, whole in each process; a merged export adds the adapters to those 4-bit values."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters, e.g. `[embed_tokens]`; tied embeddings stay tied."""
    start: str | None = None
    """Adapters to train on, in PEFT's format, made by these settings: a directory, such as the export of a run, or a
    hub id. Unset: new ones, which change nothing at first."""

    @model_validator(mode="after")
    def _plain_beside_four_bits(self) -> Lora:
        if self.base == "nf4" and self.dora:
            raise ValueError("dora needs the lengths of whole rows: leave base=nf4 or dora out")
        return self


class Batch(Section):
    """The meaning of a step, and how much of it is computed at once."""

    examples: PositiveInt = 64
    """Examples in one optimizer step, over all processes."""
    tokens: CountOrAuto = 8192
    """The most tokens in one micro-batch: a hard limit on memory, without influence on the result.
    `parallel.ulysses` processes share one. `auto` (needs data.max_tokens) finds the largest that fits."""


class Train(Section):
    """How long."""

    epochs: Annotated[PositiveInt, BeforeValidator(_whole)] = 1
    """Passes over the data."""
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps; more than `epochs` holds begin further passes."""
    patience: PositiveInt | None = None
    """Stop early: when so many measurements in a row, of what chooses the best step (`checkpoint.best`), have brought
    nothing better. Unset: all steps are taken."""
    on_nonfinite: Annotated[str, Field(pattern=r"^(stop|skip:[1-9]\d{0,3})$")] = "stop"
    """What happens when a loss or gradient is no finite number: stop, or leave out the update of up to this many steps
    of the run, e.g. `skip:3`. Either way `bad_step.json` names the rows, and `replay RUN` computes the step again."""

    label_smoothing: Decay = 0.0
    """Share of each target's probability that is spread over the vocabulary while training; validation has none."""
    neftune: NaturalFloat = 0.0
    """Uniform noise on embeddings while training: +-this / sqrt(tokens of the example x width); 5 is usual."""
    balance: NaturalFloat | None = None
    """Weight of a mixture's balance loss, e.g. 0.001, of each example by itself. Unset: the model's own
    `router_aux_loss_coef` where its configuration sets `output_router_logits`, else none."""

    @property
    def skips(self) -> int:
        """Steps whose update may be left out."""
        return 0 if self.on_nonfinite == "stop" else int(self.on_nonfinite.removeprefix("skip:"))


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """`adamw` (Loshchilov & Hutter, 2019); `adamw8bit` keeps its moments in 8 bits (Dettmers et al., 2021), by torchao,
    `schoolhouse[adamw8bit]`; `muon` (Jordan et al., 2024) moves the matrices between layers in all their
    directions alike, scaled so that AdamW's learning rates serve (Liu et al., 2025); AdamW moves the rest."""
    learning_rate: PositiveFloat = 1e-5
    """The peak, after warm-up."""
    rates: dict[str, PositiveFloat] = {}
    """Factors of the learning rate for some parameters, e.g. `{vision: 0.1, lora_B: 16, "embed|lm_head": 0.5}`. A key
    is a part (`vision`, `projector`, `language`) or a regex found in the name; the first that matches decides."""
    schedule: Annotated[str, Field(pattern=r"^(cosine|linear|constant|wsd|wsd:(0\.\d*[1-9]\d*|1))$")] = "cosine"
    """The way down from the peak to `minimum`: `cosine`, `linear` or `constant`; `wsd` (warm-up, stable, decay; Hägele
    et al., 2024) stays at the peak and falls in a line in the last fifth of all steps, `wsd:0.1` in the last tenth."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises from 0, below 1: 0.05, not a number of steps."""
    minimum: Fraction = 0.0
    """The learning rate of the last step, as a share of the peak."""
    weight_decay: NaturalFloat = 0.01
    """Decoupled decay of matrices; vectors (norms, biases) are never decayed."""
    beta1: Decay = 0.9
    """Decay of the mean of gradients (AdamW)."""
    beta2: Decay = 0.95
    """Decay of the mean of squared gradients (AdamW)."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean of squared gradients (AdamW)."""
    momentum: Decay = 0.95
    """Decay of the sum of gradients (Muon)."""
    clip: PositiveFloat | None = 1.0
    """The largest norm of the whole gradient; null clips nothing."""

    @model_validator(mode="after")
    def _decays(self) -> Optim:
        if self.warmup + (self.falling or 0.0) > 1:
            raise ValueError(f"warmup ({self.warmup:g}) and {self.schedule}'s fall ({self.falling:g}) are more than "
                             "all steps")
        return self

    @property
    def falling(self) -> float | None:
        """The share of all steps, the last ones, in which wsd falls; None for other schedules."""
        name, _, share = self.schedule.partition(":")
        return float(share or 0.2) if name == "wsd" else None

    @model_validator(mode="after")
    def _patterns(self) -> Optim:
        for pattern in self.rates:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rates has {pattern!r}, which is no regex: {error}") from None
        return self


class Validation(Section):
    """The loss on `data.validation`: the training equation, each row once."""

    every: NaturalInt = 0
    """Steps between two measurements. 0: only before the first and after the last step."""


class Exam(Section):
    """Answers written by the model and graded."""

    data: AnySource | None = None
    """The conversations; their assistant messages are the reference answers. Unset: no exam."""
    turns: Literal["last", "every"] = "last"
    """`last`: only the last answer is written. `every`: the conversation is played turn by turn, with the student's own
    answers as its history; answers that the data gives the weight 0 are written and not graded."""
    grader: str = "gsm8k"
    """`gsm8k` (the number after `####`), `exact`, `contains`, or your own `module:function(answer, reference)`."""
    every: NaturalInt = 0
    """Steps between two exams. 0: only before the first and after the last step."""
    max_new_tokens: PositiveInt = 512
    """The longest answer, in tokens; one that has not stopped by then is graded as it stands."""
    temperature: NaturalFloat = 0.0
    """0 takes the most likely token; otherwise answers are drawn, the same ones for the same seed."""
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] = 1.0
    """Draw only from the most likely tokens that hold this much probability."""
    examples: PositiveInt = 64
    """Questions answered at the same time."""


class Checkpoint(Section):
    """What is kept of a run."""

    every: PositiveInt = 200
    """Steps between two checkpoints. The last step and the best one are always kept."""
    keep: PositiveInt = 2
    """Checkpoints kept beside the best one."""
    best: Literal["exam", "validation", "none"] | None = None
    """What chooses the best step, which `export`, `chat` and `eval` take: the exam's score, or the loss of validation;
    of equal ones the last. `none`: they take the newest. Unset: the exam, where there is one."""


class Parallel(Section):
    """How processes share the work; the result is the same for every layout. `run --nproc N` starts N processes."""

    replicate: PositiveInt = 1
    """Groups of processes that hold the whole model each."""
    shard: Literal[-1] | PositiveInt = -1
    """Processes that hold a part of every weight and take micro-batches of their own (FSDP2). -1: all that remain."""
    ulysses: PositiveInt = 1
    """Processes that share one micro-batch, each with a part of its tokens; divides the model's attention heads."""
    offload: Switch = False
    """Keep weights, gradients and moments in host memory; the accelerator holds only the block at work."""
    hang_timeout: PositiveFloat = 1800.0
    """Seconds without a finished step after which the run is taken to hang: stacks are written, exit code 7."""
    max_restarts: NaturalInt = 0
    """Times that `run --nproc` starts all processes again after one died; they continue from the last checkpoint."""


class Track(Section):
    """Where else a run's records go, while it goes on; a process of its own reads them from the run's directory."""

    to: Literal["tensorboard", "wandb", "trackio"] | None = None
    """The tracker's package, which must be installed. tensorboard writes into the run's directory; wandb takes its key
    from WANDB_API_KEY or `wandb login`."""
    project: str = "schoolhouse"
    """The project's name, for wandb and trackio; the run's is that of its directory."""


class Recipe(Section):
    """One page that says who is taught what, and how."""

    model: Annotated[Model, BeforeValidator(_source, json_schema_input_type=Model | str)]
    data: Annotated[Data, BeforeValidator(lambda v: {"train": v} if isinstance(v, str) else v,
                                          json_schema_input_type=Data | str)]
    directory: str | None = None
    """The run's directory. Unset: `runs/` and the recipe's file name."""
    seed: NaturalInt = 0
    """Decides the order of the data, dropout and drawn answers."""
    lora: Lora | None = None
    """Adapters instead of full fine-tuning."""
    device: str = "auto"
    """A torch device such as `cpu` or `cuda`. auto: the accelerator where there is one."""
    batch: Batch = Batch()
    train: Train = Train()
    optim: Optim = Optim()
    validation: Validation = Validation()
    exam: Exam = Exam()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()
    track: Track = Track()

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        longest = self.data.max_tokens
        if longest is None and self.batch.tokens == "auto":
            raise ValueError("batch.tokens=auto needs data.max_tokens, the longest example that must fit")
        if longest is not None and longest > self.micro_batch:
            raise ValueError(f"data.max_tokens ({longest}) must not exceed batch.tokens ({self.batch.tokens})")
        if self.model.float8 and self.lora is not None:
            raise ValueError("model.float8 is for full fine-tuning: leave it or lora out")
        if self.validation.every and self.data.validation is None:
            raise ValueError("validation.every needs data.validation")
        if self.exam.data is not None and self.exam.data.proportion is not None:
            raise ValueError("exam.data is asked as a whole: it has no proportion")
        judges = {"exam": ("exam.data", self.exam.data), "validation": ("data.validation", self.data.validation)}
        needed, judge = judges.get(self.checkpoint.best, ("", self))
        if judge is None:
            raise ValueError(f"checkpoint.best={self.checkpoint.best} needs {needed}")
        often = {"validation": self.validation.every, "none": 0}.get(self.checkpoint.best, self.exam.every)
        if self.train.patience and not often:
            raise ValueError("train.patience needs exam.every, or checkpoint.best=validation and validation.every")
        if self.exam.every and self.exam.data is None:
            raise ValueError("exam.every needs exam.data")
        if self.optim.name == "muon" and self.lora is not None:
            raise ValueError(
                "optim.name=muon moves whole matrices, and adapters (lora) are thin factors: set optim.name=adamw "
                "(with a learning_rate of about 1e-4 to 4e-4), or remove the section lora to train whole weights"
            )
        return self

    @property
    def max_tokens(self) -> int:
        """The longest example, in tokens."""
        return self.data.max_tokens or self.micro_batch

    @property
    def micro_batch(self) -> int:
        """The most tokens in one micro-batch; with `auto`, the fewest that it can come to."""
        return self.data.max_tokens if self.batch.tokens == "auto" else self.batch.tokens
