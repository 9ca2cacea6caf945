"""Limits that the config and the manifest share, so that a manifest can hold whatever a config accepts.

A manifest may be untrusted, so every number in it that costs memory or time has a limit, far beyond what real models
have.
"""

from typing import Annotated

from pydantic import Field

MAX_CONTEXT = 1 << 24  # tokens; the longest contexts of models have 10 million
MAX_PROMPT_TOKENS = 1 << 15  # tokens of a smoke prompt
MAX_GOLDEN_TOKENS = 1 << 16  # tokens of a golden prompt: a conversation after the same system prompt
MAX_ANSWER_TOKENS = 1024  # tokens of a recorded answer: a laptop needs seconds to decode it
MAX_SMOKE_PROMPTS = 32
MAX_GOLDEN_PROMPTS = 256
MAX_FILES = 4096  # files of a published model, and files of its data set
MAX_FILE_BYTES = 1 << 44  # bytes of a file
MAX_MANIFEST_BYTES = 8 << 20  # a manifest has about 20 KB of text; anything far larger is not one
MAX_TEXT = 1 << 12  # characters of a name, a path or a pattern
MAX_MESSAGE = 1 << 15  # characters of a message or a system prompt
MAX_TEMPLATE_CHARS = 1 << 20  # characters of a chat template; the longest of real templates has about 20,000
MAX_SEED = (1 << 32) - 1  # the largest that numpy and torch take

Temperature = Annotated[float, Field(ge=0, le=100, strict=True)]
TopP = Annotated[float, Field(gt=0, le=1, strict=True)]
Tokens = Annotated[int, Field(ge=1, le=MAX_CONTEXT, strict=True)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Message = Annotated[str, Field(max_length=MAX_MESSAGE)]
