"""A head that is said to share its weights with the embeddings, and does not."""

from transformers import PreTrainedConfig, PreTrainedModel

from lightning_sft.model.lora import has_lora


def say_if_untied(config: PreTrainedConfig, model: PreTrainedModel) -> None:
    """Let `config` say that the head of a model has weights of its own, if they have parted from the embeddings.

    They have where the head was replaced, and where both were loaded from files with different values, which
    `transformers` then keeps. A model that is built from its configuration, as for a checkpoint or an export, would tie
    them again and lose one of them.
    """
    head = model.get_output_embeddings()
    if head is None or has_lora(model):  # adapters wrap the head, and tie the copies that they train themselves
        return
    name = next((name for name, module in model.named_modules() if module is head), "")
    if f"{name}.weight" not in (model._tied_weights_keys or {}):
        return
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        for each in (config, config.get_text_config()):
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False
