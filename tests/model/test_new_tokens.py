"""model/tokens.py: new tokens in the tokenizer, and rows for them in the embedding and the head."""

import pytest
import torch
from tiny import tiny_llama, tiny_qwen3, tiny_tokenizer

from lit_sft.errors import UserError
from lit_sft.model.load import load_tokenizer
from lit_sft.model.new_tokens import add_tokens, make_room

NEW = ["<call>", "</call>"]


@pytest.mark.parametrize(
    ("template", "text"), [("", "hello<call>1</call>"), ("{{ '<call>' }}", "hello1</call>")]
)
def test_a_new_token_is_one_id_and_special_if_the_template_writes_it(tmp_path, template, text):
    """Also after saving."""
    tokenizer = tiny_tokenizer()
    ids = add_tokens(tokenizer, NEW, template)
    assert ids == [320, 321]
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, load_tokenizer(str(tmp_path))):
        encoded = one("hello<call>1</call>", add_special_tokens=False)["input_ids"]
        assert [i for i in encoded if i >= 320] == ids
        assert one.decode(encoded, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<new>", "<|im_end|>"], "'<|im_end|>' is in the tokenizer already; leave it out"),
        (["<new>", "<new>"], "'<new>' is named twice; leave it out"),
        ([""], "'' is empty"),
        ([" <new>"], "' <new>' is empty or begins or ends with a space"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message):
    with pytest.raises(UserError) as error:
        add_tokens(tiny_tokenizer(), tokens)
    assert message in str(error.value)


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen3])
def test_new_rows_are_the_mean_of_the_old_ones(build):
    model, before = build(), build()
    make_room(model, [320, 321])
    tied = build is tiny_qwen3
    for ours, old in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        assert ours.shape == (384, 32)
        assert torch.equal(ours[:320], old)
        torch.testing.assert_close(ours[320:], old.mean(0).expand(64, -1))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.config.vocab_size == 384


def test_rows_to_spare_are_used_before_the_matrix_grows():
    model = tiny_llama(vocab_size=330)
    make_room(model, [320, 321])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 330
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[321], rows[:320].mean(0))
