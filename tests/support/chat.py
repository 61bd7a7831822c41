"""Conversations, and the public chat templates in short."""

from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from support.models import character_tokenizer
from support.rows import encode as encoded_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (
    "<|im_start|>system\n{{ messages[0].content if messages[0].role == 'system' else 'You are Qwen.' }}"
    "{% for t in tools or [] %}{{ '\n' }}{{ t | tojson }}{% endfor %}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}{{ '\n' + m.content if m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the system's words belong to the first question, and there is no generation prompt
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' and loop.index0 == 1 }}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # a whole conversation is closed by EOS
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (  # only the turn after the last question keeps its reasoning
    "{% set questions = messages | selectattr('role', 'equalto', 'user') | list %}{% set ns = namespace(asked=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and ns.asked == questions | length %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    "<|im_end|>",
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
SPECIAL += ["<end_of_turn>", "<|user|>", "<|assistant|>"]
FORMATS = {  # template, and what ends a turn
    "ChatML": (CHATML, "<|im_end|>"),
    "Qwen2.5": (QWEN, "<|im_end|>"),
    "Llama 3": (LLAMA3, "<|eot_id|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Mistral": (MISTRAL, "<eos>"),
    "Phi": (PHI, "<|end|>"),
}


def chat_tokenizer(template: str | dict[str, str] | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = character_tokenizer(bos=bos)
    swallows_line_breaks = AddedToken("<|end|>", rstrip=True, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, swallows_line_breaks]})
    tokenizer.chat_template = template
    return tokenizer


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
LONG = [user("2+2?"), assistant("4."), user("3+3?"), assistant("6!")]


def encode(rows: object, tokenizer: PreTrainedTokenizerFast, **options: object) -> Dataset:
    return encoded_rows(rows, tokenizer, **options).dataset


def responses(row: dict, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each stretch of tokens that is learnt."""
    bounds = [row["num_prompt_tokens"], *row["excluded_spans"], len(row["input_ids"])]
    texts = [
        tokenizer.decode(row["input_ids"][start:end]) for start, end in zip(bounds[::2], bounds[1::2], strict=True)
    ]
    return [text for text in texts if text]


def learnt(messages: object, template: str, **options: object) -> list[str]:
    tokenizer = chat_tokenizer(template)
    (row,) = encode([{"messages": messages}], tokenizer, **options)
    return responses(row, tokenizer)


def examples(messages: object, template: str, **options: object) -> list[tuple[str, ...]]:
    """What stands before and what is learnt of each example that a conversation becomes."""
    tokenizer = chat_tokenizer(template)
    rows = encode([{"messages": messages}], tokenizer, **options)
    return [
        (tokenizer.decode(row["input_ids"][: row["num_prompt_tokens"]]), *responses(row, tokenizer)) for row in rows
    ]


def prompt(messages: object, template: str) -> str:
    return chat_tokenizer(template).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


THOUGHT = [
    user("2+2?"),
    assistant("4.", reasoning_content="easy"),
    user("3+3?"),
    assistant("6!", reasoning_content="harder"),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS = [
    user("1+2?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": None},
    assistant("It is 3."),
]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
