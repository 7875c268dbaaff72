"""What elastic versions of diffusers transformers share: blocks with a role, budgets, and refusals.

The forwards of the base are not copied. A block of an elastic model is the base's block with another class, so the
names of weights stay. What a call needs (where its latents lie, and the spatial tokens that wait for Write) travels as
a :class:`Call` through arguments that the base hands on to its blocks. Nothing is kept on modules, so a block that
gradient checkpointing runs once more does what it did before.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from elit.conditions import Condition
from elit.errors import ElitError, first_line
from elit.interface import Layout, RetrofitInterface, check_budget, to_level, triple
from elit.interface.grid import Triple
from elit.interface.retrofit import Start

KEY = "elit"
"""The entry of the attention arguments that carries the call, and the name of the interface in a model."""

Budget = float | Callable[[float], float]
"""A fraction of the latents, or a function of the noise level t, in [0, 1], such as :class:`~elit.BudgetByNoise`."""


AS_BASE: Literal["base"] = "base"
"""In place of a layout: a forward without Read and Write."""


class Call:
    """One forward of an elastic model: its interface, where its latents lie, and the tokens that wait for Write."""

    def __init__(self, interface: RetrofitInterface, layout: Layout | Literal["base"]) -> None:
        self.interface = interface
        self.layout = layout
        self.spatial: Tensor | None = None

    def before(self, block: "ElasticBlock", x: Tensor, condition: Tensor | None) -> Tensor:
        """Returns what a block works on: latents, where it is the first one of the core, of tokens x (B, N, D)."""
        if not block.reads or isinstance(self.layout, str):
            return x
        assert condition is not None
        self.spatial = x
        return self.interface.read(x, condition, self.layout)

    def after(self, block: "ElasticBlock", x: Tensor) -> Tensor:
        """Returns what comes after a block: spatial tokens again, where it is the last one of the core."""
        if not block.writes or isinstance(self.layout, str):
            return x
        assert self.spatial is not None
        return self.interface.write(self.spatial, x, self.layout)

    def kept(self, block: "ElasticBlock", positions: Tensor, dim: int = 0, prefix: int = 0) -> Tensor:
        """Returns the positions that a block works at: of all tokens, or in the core those of the kept ones.

        Args:
            dim: of the tokens.
            prefix: so many tokens of text stand before those of the image.
        """
        if not block.in_core or isinstance(self.layout, str):
            return positions
        of_image = positions.narrow(dim, prefix, positions.shape[dim] - prefix).index_select(dim, self.layout.kept)
        return torch.cat((positions.narrow(dim, 0, prefix), of_image), dim) if prefix else of_image


def taken(arguments: Mapping[str, Any] | None) -> tuple[Call, dict[str, Any]]:
    """Takes the call out of the attention arguments of a block, and returns it with the others."""
    others = dict(arguments or {})
    return others.pop(KEY), others


class ElasticBlock(nn.Module):
    """A block that knows its role. Subclasses are blocks of diffusers too, and change class in place.

    Attributes:
        in_core: whether it works on latents.
        reads: whether it is the first such block.
        writes: whether it is the last one.
    """

    in_core = reads = writes = False


class ElasticMixin:
    """Makes a transformer of diffusers elastic: windows, Read and Write around its core, and budgets.

    Attributes:
        base: the class of diffusers that it is made of.
        stacks: the names of its lists of blocks, in order.
        block_versions: the elastic version of each class of blocks.
        attention_arguments: the name of the argument that its forward hands on to the attention of blocks.
        default_window: tokens of a window along (T, H, W).
        timesteps: how many time units its forward counts from data to noise.
        joint_guidance: whether its pipelines run both terms of guidance as one batch, and which half then is the weak
            one; None where they run one after the other.
        refused: arguments of its forward that it cannot work with, and why.
        predicts: what its base was trained to predict.
        condition: what its base draws: classes, captions, or captions with a vector for the whole
            (:class:`~elit.data.text.PipelineEncoder`).
        text_width: the entry of its configuration that says how wide embedded captions are.
        idle: layers of its last block that its answer does not depend on, which get no gradient.
    """

    base: ClassVar[Any]
    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    block_versions: ClassVar[dict[type, type]]
    attention_arguments: ClassVar[str]
    default_window: ClassVar[Triple] = (1, 4, 4)
    timesteps: ClassVar[float] = 1000.0
    joint_guidance: ClassVar[tuple[str, str] | None] = None
    refused: ClassVar[dict[str, str]] = {}
    predicts: ClassVar[Literal["noise", "velocity"]] = "velocity"
    condition: ClassVar[Literal["classes", "captions", "pooled captions"]]
    text_width: ClassVar[str] = ""
    idle: ClassVar[tuple[str, ...]] = ()

    _cp_plan = None  # windows and latents are not split over devices
    config: Any
    elit: RetrofitInterface

    # -------------------------------------------------------------------------------------------- making one

    def __init_subclass__(cls) -> None:
        """Gives a family the signature of its base, with the settings of the interface beside it."""
        super().__init_subclass__()
        base = cls.base

        def __init__(  # noqa: N807
            self: Any,
            read_after: int | None = None,
            write_after: int | None = None,
            group_size: int | tuple[int, ...] | None = None,
            min_latents: int | None = None,
            start: Start = "base",
            **of_base: Any,
        ) -> None:
            base.__init__(self, **of_base)
            self.become_elastic(read_after, write_after, group_size, min_latents, start)

        own = list(inspect.signature(__init__).parameters.values())[1:-1]
        of_base = list(inspect.signature(base.__init__).parameters.values())
        together = [*of_base, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own)]
        __init__.__signature__ = inspect.Signature(together)  # type: ignore[attr-defined]  # the configuration is read off it
        cls.__init__ = register_to_config(__init__)  # type: ignore[method-assign]

        @functools.wraps(base.forward)  # pipelines look at its arguments
        def forward(self: Any, *args: Any, layout: Layout | Literal["base"] | None = None, **kwargs: Any) -> Any:
            return self.run(args, kwargs, layout)

        cls.forward = forward
        cls._call_signature = inspect.signature(base.forward)
        cls._skip_layerwise_casting_patterns = [*base._skip_layerwise_casting_patterns, KEY]
        elastic = {kind.__name__: version.__name__ for kind, version in cls.block_versions.items()}
        cls._repeated_blocks = list(elastic.values())
        cls._no_split_modules = [elastic.get(name, name) for name in base._no_split_modules or elastic]
        for kind, version in cls.block_versions.items():
            TransformerBlockRegistry.register(version, TransformerBlockRegistry.get(kind))

    forward: ClassVar[Callable[..., Any]]
    _call_signature: ClassVar[inspect.Signature]
    _skip_layerwise_casting_patterns: ClassVar[list[str]]
    _repeated_blocks: ClassVar[list[str]]
    _no_split_modules: ClassVar[list[str]]

    @classmethod
    def made_of(cls, base: Any, **settings: Any) -> Self:
        """Makes an elastic model of a pretrained one, with whose weights it shares memory."""
        shared: dict[int, Any] = {id(each): each for each in chain(base.parameters(), base.buffers())}
        elastic = copy.deepcopy(base, shared)
        elastic.__class__ = cls
        elastic.become_elastic(**settings)
        return elastic

    def become_elastic(
        self,
        read_after: int | None,
        write_after: int | None,
        group_size: int | tuple[int, ...] | None,
        min_latents: int | None,
        start: Start,
    ) -> None:
        """Gives every block its role, and makes a new interface around the core.

        Raises:
            ElitError: blocks, windows or levels that do not fit.
        """
        this: Any = self
        blocks = [block for stack in self.stacks for block in getattr(self, stack)]
        margin = max(1, round(len(blocks) * 2 / 15))
        read_after = margin if read_after is None else read_after
        write_after = len(blocks) - margin if write_after is None else write_after
        if not 0 <= read_after < write_after <= len(blocks):
            raise ElitError(
                f"read_after is {read_after} and write_after {write_after}; of {len(blocks)} blocks choose "
                f"0 <= read_after < write_after <= {len(blocks)}"
            )
        for number, block in enumerate(blocks):
            block.__class__ = self.block_versions[type(block)]
            block.in_core = read_after <= number < write_after
            block.reads = number == read_after
            block.writes = number == write_after - 1
        window = self.default_window if group_size is None else triple(group_size)
        heads = self.config.num_attention_heads
        width = heads * self.config.attention_head_dim
        weight = next(parameter for parameter in this.parameters() if parameter.is_floating_point())
        with torch.device(weight.device):
            self.elit = RetrofitInterface(width, heads, window, min_latents, start)
        self.elit.to(this.dtype)
        self.elit.train(this.training)
        this.register_to_config(
            read_after=read_after,
            write_after=write_after,
            group_size=window,
            min_latents=self.elit.levels[0],
            start=start,
        )
        self._budget: Budget | None = None
        self._weak_budget: Budget | None = None
        self._branch: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Self:
        """Loads an elastic model that ``save_pretrained`` wrote.

        Raises:
            ElitError: there is none, it is damaged, or it is a model of another class, such as the base.
        """
        above: Any = super()
        places = {"subfolder", "cache_dir", "revision", "token", "local_files_only", "force_download", "proxies"}
        given = {name: options[name] for name in places & options.keys()}
        try:
            found = cls.load_config(pretrained_model_name_or_path, **given)  # type: ignore[attr-defined]
            if found.get("_class_name") == cls.__name__:
                return above.from_pretrained(pretrained_model_name_or_path, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise ElitError(f"cannot load an elastic model from {pretrained_model_name_or_path}: {reason}") from error
        raise ElitError(
            f"{pretrained_model_name_or_path} holds a {found.get('_class_name')}, not a {cls.__name__}; load it with "
            f"{cls.base.__name__} and give it to elit.elastify"
        )

    # -------------------------------------------------------------------------------------------- budgets

    @property
    def levels(self) -> tuple[int, ...]:
        """The numbers of latents per window J~ that the model may run with, ascending."""
        return self.elit.levels

    @property
    def num_latents(self) -> int:
        """J, the number of latents per window."""
        return self.elit.num_latents

    def level(self, budget: float | None) -> int:
        """Turns a budget into the nearest level; None is full.

        Raises:
            ElitError: it is not in (0, 1], or below what the model may run with.
        """
        return self.num_latents if budget is None else to_level(budget, self.levels, self.num_latents)

    def set_budget(self, budget: Budget | None, weak: Budget | None = None) -> None:
        """Sets the budget of all forwards to come that are given none: the knob for pipelines.

        Args:
            budget: a fraction of the latents in (0, 1], or a function of the noise level; None is full.
            weak: the budget of the weak term of guidance, where it is another one (cheap classifier-free guidance).
                Pipelines that guide in one batch (DiT, PixArt, SD3) must then be asked for guidance. None is the budget
                of the strong term.

        Raises:
            ElitError: a budget that the model cannot run with.
        """
        for each in (budget, weak):
            if not callable(each):
                self.level(each)
        self._budget, self._weak_budget = budget, weak

    @property
    def budgets(self) -> tuple[Budget | None, Budget | None]:
        """What :meth:`set_budget` set: the budget, and that of the weak term."""
        return self._budget, self._weak_budget

    @contextmanager
    def cache_context(self, name: str, **details: Any) -> Iterator[None]:
        """Tells the model which term of guidance runs, as pipelines do that run one after the other."""
        above: Any = super()
        before, self._branch = self._branch, name
        try:
            with ExitStack() as stack:
                if hasattr(above, "cache_context"):
                    stack.enter_context(above.cache_context(name, **details))
                yield
        finally:
            self._branch = before

    # -------------------------------------------------------------------------------------------- training

    @classmethod
    def shards_of(cls, transformer: Any) -> list[nn.Module]:
        """Returns the blocks of a transformer, elastic or its base, that nothing but their own forward uses: those
        whose weights can lie in shards and be whole only while they run."""
        return [block for stack in cls.stacks for block in getattr(transformer, stack)]

    @classmethod
    def data_of(cls, config: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
        """Returns the channels of the data of a base and its patch size, two numbers for images and three for video,
        given its configuration."""
        return config["in_channels"], (config["patch_size"], config["patch_size"])

    def inputs(self, x: Tensor, timestep: Tensor, y: Condition) -> dict[str, Any]:
        """Returns what a forward is given to predict noisy data x (B, C, H, W) at time steps (B,) of conditions y."""
        raise NotImplementedError

    def prediction(self, output: Tensor, x: Tensor) -> Tensor:
        """Returns the output of a forward in the layout of the noisy data x."""
        return output

    # -------------------------------------------------------------------------------------------- a forward

    def grid_size(self, given: dict[str, Any]) -> Triple:
        """Returns the tokens (T, H, W) of what a forward is given."""
        height, width = given["hidden_states"].shape[-2:]
        return 1, height // self.config.patch_size, width // self.config.patch_size

    def __call__(
        self,
        *args: Any,
        budget: float | None = None,
        num_latents: int | None = None,
        layout: Layout | Literal["base"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the forward of the base, its core on latents.

        Args:
            args, kwargs: as the base takes them. Their attention arguments may have an entry ``budget``.
            budget: the fraction of the latents to use; None is that of :meth:`set_budget`.
            num_latents: in its place the number of latents per window J~.
            layout: for code that has looked it up already; :data:`AS_BASE` runs the forward of the base as it was.

        Raises:
            ElitError: a budget or input that the model cannot work with.
        """
        above: Any = super()
        if layout is not None:
            return above.__call__(*args, layout=layout, **kwargs)
        given = self._call_signature.bind_partial(self, *args, **kwargs).arguments
        self.check_inputs(given)
        kwargs, in_arguments = self._without_budget(kwargs)
        budget = in_arguments if budget is None else budget
        if num_latents is None:
            level, weak = self._levels_of(given, budget)
        else:
            level, weak = self._checked(num_latents, budget), None
        size, device = self.grid_size(given), given["hidden_states"].device
        strong = self.layout_of(size, level, device)
        if weak is None or weak == level:
            return above.__call__(*args, layout=strong, **kwargs)
        return self._guided(args, kwargs, given["hidden_states"], strong, self.layout_of(size, weak, device))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout | Literal["base"] | None) -> Any:
        """Runs the forward of the base, with the call among the arguments that it hands on to its blocks."""
        if layout is None:  # somebody called forward itself
            return self(*args, **kwargs)
        above: Any = super()
        with self.carried(Call(self.elit, layout), kwargs) as arguments:
            return above.forward(*args, **arguments)

    @contextmanager
    def carried(self, call: Call, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Adds a call to what the base's forward is given."""
        yield kwargs | {self.attention_arguments: {**(kwargs.get(self.attention_arguments) or {}), KEY: call}}

    def check_inputs(self, given: dict[str, Any]) -> None:
        """Refuses inputs that cannot work on latents.

        Raises:
            ElitError: there is one.
        """
        for name, reason in self.refused.items():
            if given.get(name) is not None:
                raise ElitError(f"an elastic {self.base.__name__} takes no {name}: {reason}")

    def layout_of(self, size: Triple, level: int, device: torch.device) -> Layout:
        """Returns where the latents of a level lie in a grid of tokens (T, H, W).

        Raises:
            ElitError: windows do not tile it.
        """
        try:
            return self.elit.layout(size, level, device)
        except ElitError as error:
            raise ElitError(f"{error}, or another size of the picture: windows are not padded") from error

    def _without_budget(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
        """Takes the budget out of the attention arguments."""
        arguments = kwargs.get(self.attention_arguments)
        if not arguments or "budget" not in arguments:
            return kwargs, None
        others = {name: value for name, value in arguments.items() if name != "budget"}
        return {**kwargs, self.attention_arguments: others}, arguments["budget"]

    def _checked(self, num_latents: int, budget: float | None) -> int:
        if budget is not None:
            raise ElitError("give a budget or num_latents, not both")
        if num_latents not in self.levels:
            raise ElitError(f"num_latents is {num_latents!r}; this model has the levels {list(self.levels)}")
        return num_latents

    def _levels_of(self, given: dict[str, Any], budget: float | None) -> tuple[int, int | None]:
        """Returns the levels of the strong and of the weak half of a batch; None for the latter where there is none."""

        def level(chosen: Budget | None) -> int:
            if callable(chosen):
                chosen = check_budget(chosen(float(given["timestep"].flatten()[0]) / self.timesteps))
            return self.level(chosen)

        weak = self._weak_budget
        if budget is not None or weak is None:
            return level(self._budget if budget is None else budget), None
        if self._branch is not None:
            return level(weak if self._branch == "uncond" else self._budget), None
        if self.joint_guidance is None:
            return level(self._budget), None
        return level(self._budget), level(weak)

    def _guided(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden_states: Tensor, strong: Layout, weak: Layout
    ) -> Any:
        """Runs the two halves of a guided batch, each at its own level."""
        count = len(hidden_states)
        if count % 2:
            raise ElitError(
                f"a weak budget is set, and a batch of {count} has no weak half; ask the pipeline for guidance, or "
                "set the budget without a weak one"
            )
        assert self.joint_guidance is not None
        above: Any = super()
        layouts = {"cond": strong, "uncond": weak}

        def half(index: int, value: Any) -> Any:
            whole = not isinstance(value, Tensor) or value.dim() == 0 or len(value) != count
            return value if whole else value.chunk(2)[index]

        outputs = []
        for index, term in enumerate(self.joint_guidance):
            own_args, own_kwargs = tree_map(lambda value, index=index: half(index, value), (args, kwargs))
            own_kwargs["return_dict"] = False
            outputs.append(above.__call__(*own_args, layout=layouts[term], **own_kwargs)[0])
        sample = torch.cat(outputs)
        return Transformer2DModelOutput(sample=sample) if kwargs.get("return_dict", True) else (sample,)
