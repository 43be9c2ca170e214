"""How many tokens a model in the hub's layout takes, as its files say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reconciler.runtime import hub_folder


@pytest.mark.parametrize(
    ("config", "sentences", "tokens"),
    [
        ({"max_position_embeddings": 512}, {"max_seq_length": 256}, 256),
        ({"max_position_embeddings": 512}, {"max_seq_length": 1024}, 512),
        ({"max_position_embeddings": 512}, None, 512),
        ({"text_config": {"max_position_embeddings": 64}}, None, 64),
        ({"n_positions": 32, "text_config": {"max_position_embeddings": 64}}, None, 32),
        ({"max_position_embeddings": "many"}, {"max_seq_length": -1}, 0),
        ({}, {"max_seq_length": 256}, 256),
        (None, None, 0),
    ],
)
def test_the_shortest_length_that_a_models_files_name_counts(tmp_path: Path, config: Any, sentences: Any, tokens: int) -> None:
    for name, document in (("config.json", config), ("sentence_bert_config.json", sentences)):
        if document is not None:
            (tmp_path / name).write_text(json.dumps(document))
    assert hub_folder.context_length(hub_folder.check(tmp_path)) == tokens
