"""Files that run code when they are loaded without care; the code leaves a trace."""

import json
import os
import pickle
from pathlib import Path


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


def trace_of_payload(folder: Path) -> Path:
    """Where a payload leaves its trace; that it can, is seen first."""
    path = folder / "it ran"
    pickle.loads(pickle.dumps(Payload(path)))
    path.rmdir()
    return path


def own_code(trace: Path, **config: object) -> dict[str, str]:
    """The files of a model and a tokenizer that bring code of their own."""
    code = f"import os\nos.mkdir({str(trace)!r})\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class C(LlamaConfig): ...\nclass M(LlamaForCausalLM): ...\n"
    mapping = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    return {
        "own.py": code,
        "config.json": json.dumps({"model_type": "own", "auto_map": mapping} | config),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "T", "auto_map": mapping}),
    }
