"""Exported folders: loaded by `transformers` alone, they are the model of the run, to the last bit."""

import json
import sys
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import chat
from support.fits import make_data, make_trainer
from support.models import character_tokenizer, tiny_config
from support.processes import Processes
from support.runs import ROWS, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_sft import HuggingFaceExport, SFTModule, export_model
from lightning_sft.cli.app import main
from lightning_sft.errors import SettingsError, SettingsTypeError
from lightning_sft.export.huggingface import check_export_folder
from lightning_sft.model.attention import VARLEN
from lightning_sft.model.packing import enable_packing

MODELS = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2"},
}
IDS = torch.arange(40).view(2, 20)


def build(name, dtype=torch.float32):
    torch.manual_seed(3)
    config = tiny_config(num_key_value_heads=1, bos_token_id=None, eos_token_id=128, pad_token_id=128) | MODELS[name]
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def chat_tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    return tokenizer


def files(folder):
    return {path.name for path in folder.iterdir()}


def export_command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lightning-sft", "export", *map(str, words)])
    main()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_loads_by_itself_and_gives_the_same_logits(tmp_path, name, dtype):
    model = build(name, dtype)
    assert enable_packing(model) is None
    model.generation_config.temperature = 0.5  # without `do_sample`: published ones are like that
    config = model.config.to_dict()
    export_model(model, tmp_path / "out", chat_tokenizer())
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == VARLEN
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert loaded.dtype == dtype
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.generation_config.temperature == 0.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<hi>"
    assert VARLEN not in (tmp_path / "out" / "config.json").read_text()
    assert files(tmp_path) == {"out"}


def test_weights_are_converted_on_request(tmp_path):
    model = build("tied")
    export_model(model, tmp_path / "whole")
    export_model(model, tmp_path / "out", dtype="bfloat16")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(converted))
    assert model.dtype == torch.float32
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")  # tied: once
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_with_an_export_lightning_keeps_its_own_checkpoint_or_none_if_told_so(tmp_path):
    for has_checkpoint in (True, False):
        folder = tmp_path / str(has_checkpoint)
        options = {"callbacks": [HuggingFaceExport()], "max_steps": 1, "enable_checkpointing": has_checkpoint}
        make_trainer(folder, **options).fit(SFTModule(tiny_config()), make_data())
        assert (folder / "huggingface" / "config.json").is_file()
        assert len(list(folder.rglob("*.ckpt"))) == has_checkpoint


@pytest.mark.parametrize("comes_as", ["a model", "a folder"])
def test_a_head_that_has_parted_from_the_embeddings_is_not_lost(tmp_path, comes_as):
    """The configuration says that both share their weights. A folder may hold both, and `transformers` loads both."""
    model = build("tied")
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.save_pretrained(tmp_path / "given")
    assert json.loads((tmp_path / "given" / "config.json").read_text())["tie_word_embeddings"]
    export_model(model, tmp_path / "exported")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")), logits(model))

    module = SFTModule(model if comes_as == "a model" else str(tmp_path / "given"))
    run = make_trainer(tmp_path, max_steps=1, callbacks=[HuggingFaceExport()], enable_checkpointing=True)
    run.fit(module, make_data())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    for trained in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface"),
        SFTModule.load_from_checkpoint(checkpoint).model,
    ):
        assert torch.equal(logits(trained), logits(module.model))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_ends_with_a_folder_and_its_checkpoint_makes_the_same(tmp_path, monkeypatch, precision):
    run = tmp_path / "run"
    data = {"val_data": ROWS[:5], "max_length": 60, "prompt_template": "Say {prompt}"}
    model = build("tied")
    model.generation_config.top_k = 7
    result = train(
        run,
        data=data,
        module={"model": model},
        callbacks=[HuggingFaceExport()],
        max_steps=3,
        val_check_interval=3,
        precision=precision,
    )
    loaded = AutoModelForCausalLM.from_pretrained(run / "huggingface")
    assert loaded.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, result["weights"][name]), name
    assert torch.equal(logits(loaded), logits(model))

    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"tokenizer": str(run / "huggingface")}}))
    named = ("--config", run / "config.yaml", "--ckpt_path", "last")
    export_command(monkeypatch, *named, "--output", tmp_path / "again")
    assert files(tmp_path / "again") == files(run / "huggingface")
    for path in set((run / "huggingface").iterdir()) - set((run / "huggingface").glob("tokenizer*")):
        text = path.read_bytes().replace(b"# huggingface", b"# again")
        assert text == (tmp_path / "again" / path.name).read_bytes(), path.name
    restored = SFTModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert restored.model.generation_config.top_k == 7

    card = (run / "huggingface" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lightning-sft"],
    }
    cells = [line.strip("| ").split(" | ") for line in card.splitlines()]
    table = dict(pair for pair in cells if len(pair) == 2)
    prompts = [f"Say {row['prompt']}" for row in ROWS]
    assert int(table["train rows"]) == 43
    assert int(table["train response tokens"].replace(",", "")) == sum(len(row["output"]) + 1 for row in ROWS)
    assert int(table["train tokens"].replace(",", "")) == sum(map(len, prompts)) + int(
        table["train response tokens"].replace(",", "")
    )
    assert (table["optimizer steps"], table["batch_size"], table["max_length"]) == ("3", "8", "60")
    assert (table["optimizer"], table["lr"], table["lr_scheduler"]) == ("AdamW", "0.01", "cosine")
    assert (table["loss_normalization"], table["precision"]) == ("token", precision)
    (validation,) = map(json.loads, (run / "validations_0.jsonl").read_text().splitlines())
    for name in ("val/loss", "val/token_accuracy"):
        assert float(table[name]) == pytest.approx(validation[name], rel=1e-5)
    assert "Say {prompt}" in card


def train_both(folder):
    for strategy in ("ddp", "fsdp"):
        module = {"model": build("tied")}
        train(folder / strategy, module=module, strategy=strategy, max_steps=2, callbacks=[HuggingFaceExport()])


def test_two_processes_export_the_whole_model(tmp_path, monkeypatch):
    assert Processes(train_both, tmp_path, world_size=2).wait() == [0, 0]
    for strategy in ("ddp", "fsdp"):
        run = tmp_path / strategy
        trained = torch.load(run / "result.pt")["weights"]
        loaded = AutoModelForCausalLM.from_pretrained(run / "huggingface")
        for name, weight in loaded.named_parameters():
            assert torch.equal(weight, trained[name]), name
        assert json.loads((run / "huggingface" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    words = ["--ckpt_path", run / "checkpoints" / "last.ckpt", "--output", tmp_path / "again"]
    words += ["--tokenizer", run / "huggingface"]
    export_command(monkeypatch, *words)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (run / "huggingface" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_two_exports_to_one_folder_are_refused_and_to_two_are_not(tmp_path):
    with pytest.raises(ValueError, match=r"There are two `HuggingFaceExport`s to .*/huggingface, of which the second"):
        train(tmp_path / "one", callbacks=[HuggingFaceExport(), HuggingFaceExport(dtype="bfloat16")], max_steps=1)
    assert not (tmp_path / "one" / "checkpoints").exists()  # refused before training
    train(tmp_path / "two", callbacks=[HuggingFaceExport(), HuggingFaceExport("half", "bfloat16")], max_steps=1)
    assert {"huggingface", "half"} <= {path.name for path in (tmp_path / "two").iterdir()}


def test_a_folder_below_the_home_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    export_model(build("tied"), "~/model")
    train(tmp_path / "run", callbacks=[HuggingFaceExport("~/trained")], max_steps=1)
    assert {"config.json", "model.safetensors"} <= files(tmp_path / "home" / "model")
    assert {"config.json", "model.safetensors"} <= files(tmp_path / "home" / "trained")


def test_nothing_but_an_earlier_export_is_written_over(tmp_path):
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "README.md").write_text("---\ntags:\n- mine\n---\nNotes\n---\ntags:\n- lightning-sft\n")
    with pytest.raises(ValueError, match="holds something other than an earlier export"):
        export_model(build("tied"), tmp_path / "huggingface")
    with pytest.raises(ValueError, match="holds something other than an earlier export"):
        train(tmp_path / "run", callbacks=[HuggingFaceExport(str(tmp_path / "huggingface"))])
    assert not (tmp_path / "run" / "checkpoints").exists()  # refused before training
    assert files(tmp_path / "huggingface") == {"README.md"}
    for path in ("README.md", "README.md/model"):
        with pytest.raises(ValueError, match=r"to be exported to .*, but .*README.md is a file"):
            check_export_folder(tmp_path / "huggingface" / path)


def test_an_export_goes_where_a_link_leads_again_and_again(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for _ in range(2):
        export_model(build("tied"), tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert "model.safetensors" in files(tmp_path / "disk" / "model")
        assert {path.name for path in tmp_path.rglob("*partial")} == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "`dtype` is 'int8', expected one of float32, bfloat16, float16"),
        ({"merge_lora": "no"}, "`merge_lora` is 'no' of type str, expected true or false"),
        ({"folder": 3}, "`folder` is 3 of type int, expected the path of a folder"),
    ],
)
def test_settings_of_an_export_that_cannot_be_meant_are_refused(tmp_path, options, message):
    options = {"folder": tmp_path} | options
    for refuse in (HuggingFaceExport, partial(export_model, build("tied"))):
        with pytest.raises(SettingsError, match=message):
            refuse(**options)


def test_what_is_no_model_or_no_tokenizer_is_refused(tmp_path):
    model = build("tied")
    with pytest.raises(SettingsTypeError, match=r"`model` is .* of type SFTModule, .*, such as `module.model`"):
        export_model(SFTModule(model), tmp_path)
    with pytest.raises(SettingsTypeError, match="`tokenizer` is 'name' of type str, expected a tokenizer"):
        export_model(model, tmp_path, "name")


def test_an_export_that_stops_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    tokenizer, tied, untied = chat_tokenizer(), build("tied"), build("untied")

    def stop(*args):
        assert files(tmp_path) == {"out", ".out.partial"}
        raise KeyboardInterrupt

    export_model(tied, folder, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "save_pretrained", stop)
        with pytest.raises(KeyboardInterrupt):
            export_model(untied, folder, tokenizer)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(tied))
    for name in (".out.partial", ".out.earlier.partial"):  # of one that was killed
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00002.safetensors").touch()
    export_model(untied, folder, tokenizer)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(untied))
    assert files(tmp_path) == {"out"}
    assert "model.safetensors" in files(folder)
    assert "model-00001-of-00002.safetensors" not in files(folder)


def test_a_checkpoint_without_a_tokenizer_or_a_model_is_refused(tmp_path, monkeypatch):
    train(tmp_path, max_steps=1)
    last, words = tmp_path / "checkpoints" / "last.ckpt", ["--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"config\.yaml does not name one\. Give `--tokenizer`"):
        export_command(monkeypatch, "--ckpt_path", last, *words)
    (tmp_path / "config.yaml").write_text("data: {tokenizer: {class_path: lightning_sft.examples.word_tokenizer}}")
    export_command(monkeypatch, "--ckpt_path", last, *words)
    assert " Finn" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    checkpoint = torch.load(last)
    checkpoint["module_hyper_parameters"]["model"]["model_type"] = "own"
    torch.save(checkpoint, last)
    with pytest.raises(SystemExit, match=r"has the `model_type` 'own', which .* model_kwargs={'trust_remote_code': Tr"):
        export_command(monkeypatch, "--ckpt_path", last, *words)
    del checkpoint["module_hyper_parameters"]
    torch.save(checkpoint, last)
    with pytest.raises(SystemExit, match="does not describe its model"):
        export_command(monkeypatch, "--ckpt_path", last, *words)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="there is no complete checkpoint below `runs`"):
        export_command(monkeypatch, "--ckpt_path", "last", *words)


def test_the_chat_template_of_a_run_goes_with_its_exported_checkpoint(tmp_path, monkeypatch):
    character_tokenizer().save_pretrained(tmp_path / "tokenizer")
    train(tmp_path, max_steps=1)
    template = tmp_path / "chat.jinja"
    template.write_text(chat_tokenizer().chat_template)
    settings = {"data": {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": str(template)}}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    export_command(monkeypatch, "--ckpt_path", tmp_path / "checkpoints" / "last.ckpt", "--output", tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == chat_tokenizer().chat_template


def test_a_base_model_taught_chatml_stops_after_its_turn_in_another_program(tmp_path, monkeypatch):
    tokenizer = chat.chat_tokenizer(chat.CHATML)
    settings = tiny_config(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=128, pad_token_id=128)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    messages = [chat.user("hi"), chat.assistant("yo")]
    torch.manual_seed(0)
    train(
        tmp_path,
        data={"tokenizer": tokenizer, "train_data": [{"messages": messages}] * 4, "batch_size": 4},
        module={"model": AutoModelForCausalLM.from_config(config)},
        callbacks=[HuggingFaceExport()],
        max_steps=60,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"tokenizer": str(tmp_path / "huggingface")}}))
    export_command(monkeypatch, "--ckpt_path", tmp_path / "checkpoints" / "last.ckpt", "--output", tmp_path / "again")
    for folder in (tmp_path / "huggingface", tmp_path / "again"):
        loaded, its_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = its_tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = loaded.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
        assert its_tokenizer.decode(answer) == "yo<|im_end|>"
        im_end = its_tokenizer.convert_tokens_to_ids("<|im_end|>")
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text())["eos_token_id"] == [128, im_end]


def test_configurations_that_name_every_end_stay_as_they_are(tmp_path):
    model = build("tied")
    model.generation_config.eos_token_id = [7, 128]
    export_model(model, tmp_path / "out", character_tokenizer())
    written = [json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [each["eos_token_id"] for each in written] == [128, [7, 128]]


def test_a_tokenizer_with_several_named_templates_trains_and_exports(tmp_path):
    templates = {"default": chat.CHATML, "tool_use": chat.QWEN}
    tokenizer = chat.chat_tokenizer(templates)
    rows = [{"messages": [chat.user("hi"), chat.assistant("yo")]}] * 8
    config = {"vocab_size": len(tokenizer)}
    data = {"tokenizer": tokenizer, "train_data": rows}
    train(tmp_path, data=data, config=config, callbacks=[HuggingFaceExport()], max_steps=1)
    exported = AutoTokenizer.from_pretrained(tmp_path / "huggingface")
    assert exported.chat_template == templates
    ends = json.loads((tmp_path / "huggingface" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
