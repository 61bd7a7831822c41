"""Every causal language model of the installed `transformers` is right, or refused in words."""

import pytest
from support.architectures import MODEL_TYPES
from support.sweep import examine_apart


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_architecture_is_right_or_refused(model_type):
    verdict = examine_apart(model_type)
    if verdict.state == "not built":
        pytest.skip(verdict.refusal)
    assert verdict.state in ("agrees", "refused"), verdict
