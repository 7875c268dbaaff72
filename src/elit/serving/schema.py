"""What goes over the wire: the body of a request for images, and the answers, in the shapes of OpenAI's image API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_IMAGES = 10  # of one request, as OpenAI has it
MAX_SEED = 2**63 - 1

Quality = Literal["low", "medium", "high", "auto"]
OutputFormat = Literal["png", "jpeg", "webp"]
GuidanceKind = Literal["none", "cfg", "ccfg", "ag"]
State = Literal["ok", "starting", "stuck", "draining", "dead"]
Fraction = Annotated[float, Field(gt=0, le=1)]


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`: OpenAI's fields, and below them those that are ours.

    Null means the same as leaving a field out. A field that is not listed is refused, so that a misspelt one is told.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"examples": [{"prompt": "3", "quality": "auto", "seed": 0}]},
    )

    prompt: str | None = Field(None, max_length=4_000, description="Text; of a model of classes, a name or a number.")
    model: str | None = Field(None, description="The name of the model; this server has one.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="The number of images.")
    size: str = Field("auto", pattern=r"^(auto|\d{1,6}x\d{1,6})$", description="WIDTHxHEIGHT of the model, or auto.")
    quality: Quality = Field("auto", description="A fixed budget; auto lets the server lower it under load.")
    response_format: Literal["b64_json"] = Field("b64_json", description="How images come back.")
    output_format: OutputFormat = Field("png", description="The format of the images.")
    output_compression: int = Field(100, ge=0, le=100, description="The quality of jpeg and webp, in percent.")
    background: Literal["auto", "opaque"] = Field("auto", description="Images have no transparent parts.")
    moderation: Literal["auto", "low"] = Field("auto", description="Has no effect here.")
    user: str | None = Field(None, max_length=1000, description="Has no effect here.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, le=3, description="How often a stream shows each image as it forms.")

    labels: int | list[int] | None = Field(None, description="One class for all images, or one for each.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED - MAX_IMAGES, description="Image i starts from the noise of seed + i; else random."
    )
    steps: int | None = Field(None, ge=1, description="The number of sampling steps; else the server's.")
    solver: Literal["euler", "heun", "sde"] | None = Field(None, description="The solver; else the server's.")
    budget: Fraction | None = Field(None, description="A fixed budget, in place of quality.")
    min_budget: Fraction | None = Field(None, description="Under load, the budget may be lowered down to this.")
    guidance: GuidanceKind | None = Field(None, description="The kind of guidance; else the server's.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="How strong the guidance is; 1 is none.")
    guidance_budget: Fraction | None = Field(None, description="The budget of the weak term of ccfg and ag.")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given: Any) -> Any:
        """Takes out the fields that are null, which have their defaults then."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class GuidanceUsed(BaseModel):
    """The guidance of an image, as the fields of `elit.Guidance`."""

    kind: GuidanceKind
    scale: float
    budget: float | None
    interval: tuple[float, float]


class Recipe(BaseModel):
    """What makes an image again with `elit.sample`, and how long it took."""

    seed: int = Field(description="The seed of its noise.")
    steps: int = Field(description="The number of steps.")
    solver: str
    budgets: list[float] = Field(description="The budget that each step ran at, for the argument budget.")
    guidance: GuidanceUsed | None
    label: int | None = Field(description="Its class, for models of classes.")
    seconds: float = Field(description="From the arrival of the request to the finished image.")


class ImageData(Recipe):
    """One image of an answer."""

    b64_json: str


class InputTokens(BaseModel):
    """The parts of the input, as OpenAI counts them."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """The work of an answer, in tokens.

    Output tokens are the latent tokens that ran through the core, over all steps and images: they fall with the budget.
    """

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer to a request that does not stream."""

    created: int
    data: list[ImageData]
    model: str
    size: str
    quality: Quality
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    usage: Usage


class PartialImageEvent(BaseModel):
    """An event of a stream: an image as it forms."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    image_index: int = Field(description="Which of the n images this is.")
    created_at: int
    size: str
    quality: Quality
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"


class CompletedEvent(Recipe):
    """An event of a stream: a finished image."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    image_index: int = Field(description="Which of the n images this is.")
    created_at: int
    size: str
    quality: Quality
    output_format: OutputFormat
    background: Literal["opaque"] = "opaque"
    usage: Usage


class ErrorDetails(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorDetails


class ModelCard(BaseModel):
    """A model that is served, and what it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "elit"
    size: str = Field(description="WIDTHxHEIGHT of its images.")
    budgets: list[float] = Field(description="The budgets that it was trained for; empty without a latent interface.")
    classes: int | None = Field(description="The number of its classes; null for text or no condition.")
    takes_text: bool


class ModelList(BaseModel):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server can take requests."""

    status: State
    live: bool = Field(description="The thread that owns the device is alive and gets on.")
    ready: bool = Field(description="It is warmed up, and takes requests.")
    waiting: int = Field(description="Images that have not begun.")
    in_flight: int = Field(description="Images that have begun.")
    seconds_in_step: float | None = Field(description="For how long the running step has been running.")
