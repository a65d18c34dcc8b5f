import numpy as np

from lit_sft.data.collate import collate
from lit_sft.types import IGNORE_INDEX as IGNORE


def tokens(ids, mask, row=0):
    return np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8), row


def test_labels_are_the_next_token_where_it_is_trained():
    batch = collate([tokens([10, 11, 12, 13], [0, 0, 1, 1], row=7)])
    assert batch["labels"].tolist() == [[IGNORE, 12, 13, IGNORE]]
    assert batch["target_positions"].tolist() == [1, 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert (batch["lengths"], batch["rows"]) == ((4,), (7,))


def test_nothing_is_predicted_across_examples():
    batch = collate([tokens([1, 2], [1, 1]), tokens([3, 4, 5], [1, 0, 1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [
        [2, IGNORE, IGNORE, 5, IGNORE]
    ]  # 3 has a mask but nothing before it
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]


def test_filler_has_no_target():
    batch = collate([])
    assert (batch["labels"] == IGNORE).all()
    assert batch["rows"] == (-1,)
    assert sum(batch["lengths"]) == batch["input_ids"].shape[1]
