"""What requests may hold: OpenAI's fields as far as they are heeded, and `skills`.

A field that would change an answer and is not heeded here is refused, never left out in silence;
fields that change no answer are taken and left.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator

MOST_STOPS, MOST_SKILLS, MOST_MESSAGES, MOST_CHARACTERS = 16, 64, 4096, 4_000_000


def _whole(value: Any) -> Any:
    """An integer as JSON Schema has it: 2.0 is one, true and "2" are not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not int:
        raise ValueError("Input should be a valid integer")
    return value


WHOLE = BeforeValidator(_whole)
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Words = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]
Id = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[
    dict[Id, Annotated[float, Field(strict=True, ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]
Name = Annotated[str, Field(min_length=1, max_length=200)]
HARMLESS = (  # of OpenAI's: for its own bookkeeping
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls", "verbosity"),
)


class Function(BaseModel):
    """A function that a model asks to be called."""

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """One call of an assistant's message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: Function


class Part(BaseModel):
    """A part of a message: text alone."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        text = self.content
        if isinstance(text, list):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        made: dict[str, Any] = {"role": role, "content": text or ""}
        if self.tool_calls:
            made["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            made["tool_call_id"] = self.tool_call_id
        if self.name:
            made["name"] = self.name
        return made


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class Shape(BaseModel):
    """A JSON schema that an answer keeps to."""

    model_config = ConfigDict(extra="ignore")
    name: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class TextFormat(BaseModel):
    """Any answer."""

    type: Literal["text"] = "text"


class JsonFormat(BaseModel):
    """A JSON object."""

    type: Literal["json_object"]


class ShapeFormat(BaseModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: Shape


class Body(BaseModel):
    """What chat and text requests share."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[str, Field(max_length=500)] | None = None
    skills: Annotated[list[Name], Field(max_length=MOST_SKILLS)] = []
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0), WHOLE] | None = None
    seed: Annotated[int, WHOLE] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(strict=True, ge=-2, le=2)] | None = None
    logit_bias: Bias | None = None
    n: Literal[1] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave(cls, values: Any) -> Any:
        """Without what changes nothing."""
        if not isinstance(values, dict):
            return values
        none = {k for k, v in values.items() if v is None or k in HARMLESS}
        return {k: v for k, v in values.items() if k not in none}

    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatBody(Body):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | JsonFormat | ShapeFormat | None = None

    def shape(self) -> dict[str, Any] | None:
        """The JSON schema that is asked for."""
        if isinstance(self.response_format, ShapeFormat):
            return self.response_format.json_schema.schema_
        return {"type": "object"} if isinstance(self.response_format, JsonFormat) else None


class TextBody(Body):
    """POST /v1/completions"""

    prompt: Words | Annotated[list[Words], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def words(self) -> str:
        """The one prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
