"""The course's adapter names, so that a suite written against them runs unchanged."""

from lightning_sft import (
    compute_entropy,
    get_response_log_probs,
    masked_normalize,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)


def run_tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer):
    return tokenize_prompt_and_output(prompt_strs, output_strs, tokenizer)


def run_compute_entropy(logits):
    return compute_entropy(logits)


def run_get_response_log_probs(model, input_ids, labels, return_token_entropy=False):
    return get_response_log_probs(model, input_ids, labels, return_token_entropy)


def run_masked_normalize(tensor, mask, normalize_constant, dim=None):
    return masked_normalize(tensor, mask, normalize_constant, dim)


def run_sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0):
    return sft_microbatch_train_step(policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant)
