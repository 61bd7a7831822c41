# ruff: noqa: RUF001 (the bars in the tokens of DeepSeek are wide ones)
"""Public chat templates, read where `trl` is installed, and rows in the shapes that people have."""

import importlib.util
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from support.chat import assistant, user
from support.models import character_tokenizer

FOLDER = Path(str(importlib.util.find_spec("trl").origin)).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
ENDS = {  # what ends a turn, by the beginning of the template's name; the longest that fits
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<eos>",  # none of its own
    "glm4moe_training": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
CALL_ENDS = {  # where a turn that calls a tool ends otherwise
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
    "gemma4_v2": "<turn|>",
    "glm4moe_training": "<|observation|>",
    "gptoss": "<|call|>",
}
_SPECIAL = re.compile(
    r"<\|[\w ]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|<\|(?:turn|channel|tool_call|tool_response|tool)>"
    r"|<(?:turn|channel|tool_call|tool_response|tool)\|>|</s>|\[gMASK\]|<sop>"
)


def end_of(name: str, ends: dict[str, str]) -> str | None:
    fitting = [start for start in ends if name.startswith(start)]
    return ends[max(fitting, key=len)] if fitting else None


def template_tokenizer(name: str, base: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with a public template, to which the template's markers are special tokens."""
    tokenizer = character_tokenizer(bos=True) if base is None else base
    template = (FOLDER / f"{name}.jinja").read_text()
    special = [token for token in dict.fromkeys(_SPECIAL.findall(template)) if "think" not in token]
    end = end_of(name, ENDS)
    if end != "<eos>":
        special.append(end)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if name.startswith(("deepseek", "llava", "cohere", "gemma")):  # these write `eos_token`, or train on with it
        tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer


WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris-town"}}}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": "Result of it."}
SHAPES = {
    "one turn": [user("Question one?"), assistant("Answer one.")],
    "system": [{"role": "system", "content": "System words."}, user("Question one?"), assistant("Answer one.")],
    "several turns": [
        user("Question one?"),
        assistant("Answer one."),
        user("Question two?"),
        assistant("Answer two."),
        user("Question three?"),
        assistant("Answer three."),
    ],
    "reasoning once": [user("Question one?"), assistant("Answer one.", reasoning_content="Reason one.")],
    "reasoning in each turn": [
        user("Question one?"),
        assistant("Answer one.", reasoning_content="Reason one."),
        user("Question two?"),
        assistant("Answer two.", reasoning_content="Reason two."),
    ],
    "<think> in the content": [
        user("Question one?"),
        assistant("<think>\nReason one.\n</think>\n\nAnswer one."),
        user("Question two?"),
        assistant("<think>\nReason two.\n</think>\n\nAnswer two."),
    ],
    "tools": [user("Question one?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Answer one.")],
    "tools and reasoning": [
        user("Question one?"),
        assistant("", reasoning_content="Reason one.", tool_calls=[CALL]),
        RESULT,
        assistant("Answer one.", reasoning_content="Reason two."),
        user("Question two?"),
        assistant("Answer two."),
    ],
}
