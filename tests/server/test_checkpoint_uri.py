from __future__ import annotations

import pytest

from tg_tinker.errors import InvalidRequestError
from tg_tinker.wire.checkpoint_uri import CheckpointUri


def test_a_uri_is_parsed_whole_and_printed_back():
    """A URI survives the round trip; whatever surrounds or abbreviates it does not parse."""
    text = "bt://loops:run-1/sampler_weights/step.1_a"
    assert str(CheckpointUri.parse(text)) == text
    for bad in (f"{text}\n", f" {text}", text.replace("sampler_weights", "other"), text.replace("run-1", "..")):
        with pytest.raises(InvalidRequestError):
            CheckpointUri.parse(bad)
