"""What is trained for a caption: what is put around it, and tags that are drawn as a function of seed, sample and epoch."""

import pytest

from common.data.caching import content_key
from common.data.captions import CaptionOptions, compose
from common.model.noise import generator_for

TAGS = "1girl, solo, red hair,blue eyes ,, smile"


def drawn(options, number):
    return options.variant(TAGS, number).split(", ")


# ---------------------------------------------------------------- one text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a girl,in  a house"),  # as it is written
        ({"trigger_word": "inkstyle"}, "inkstyle, a girl,in  a house"),
        ({"prefix": "a drawing of", "suffix": "high contrast"}, "a drawing of, a girl,in  a house, high contrast"),
        ({"prefix": "best", "trigger_word": " ink ", "suffix": ""}, "best, ink, a girl,in  a house"),
        (
            {"trigger_word": "ink", "shuffle_tags": True, "tag_dropout": 0.9},
            "ink, a girl,in  a house",
        ),  # nothing is drawn
    ],
)
def test_prefix_trigger_word_caption_and_suffix_in_this_order(options, expected):
    assert CaptionOptions(**options).plain("a girl,in  a house") == expected


def test_an_empty_caption_is_the_trigger_word_alone_and_without_one_the_empty_prompt():
    assert CaptionOptions(trigger_word="ink", shuffle_tags=True, variants=4).variant("", 2) == "ink"
    assert CaptionOptions().variant("", 0) == CaptionOptions().plain("") == ""


def test_shuffling_keeps_every_tag_and_the_first_ones_in_place():
    options = CaptionOptions(trigger_word="ink", suffix="end", shuffle_tags=True, keep_tags=2, variants=40)
    variants = [drawn(options, number) for number in range(40)]
    assert all(v[:3] == ["ink", "1girl", "solo"] and v[-1] == "end" for v in variants)
    assert all(sorted(v[3:-1]) == ["blue eyes", "red hair", "smile"] for v in variants)
    assert len({tuple(v) for v in variants}) == 6  # every order of three


def test_dropout_leaves_the_order_and_the_kept_tags_and_drops_its_share():
    options = CaptionOptions(keep_tags=1, tag_dropout=0.25, variants=500)
    variants = [drawn(options, number) for number in range(500)]
    order = ["1girl", "solo", "red hair", "blue eyes", "smile"]
    assert all(v[0] == "1girl" and v == [tag for tag in order if tag in v] for v in variants)
    assert sum(len(v) - 1 for v in variants) / (4 * 500) == pytest.approx(0.75, abs=0.03)  # three standard deviations


def test_shuffling_and_dropout_are_drawn_apart():
    """Switching shuffling on changes the order of the tags that remain, not which ones do."""
    both, one = (
        CaptionOptions(shuffle_tags=True, tag_dropout=0.5, variants=9),
        CaptionOptions(tag_dropout=0.5, variants=9),
    )
    assert all(sorted(drawn(both, number)) == sorted(drawn(one, number)) for number in range(9))


def test_a_draw_is_a_function_of_its_generator():
    options = CaptionOptions(shuffle_tags=True, variants=8)
    assert [compose(TAGS, options, generator_for(i)) for i in range(5)] == [
        compose(TAGS, options, generator_for(i)) for i in range(5)
    ]


# ---------------------------------------------------------------- which text comes when

DRAWN = [
    "--trigger_word",
    "inkstyle",
    "--shuffle_tags",
    "--tag_dropout",
    0.3,
    "--keep_tokens",
    1,
    "--caption_variants",
    3,
]


class Texts(list):
    """In place of the text conditioning: records what is asked for."""

    encoders = ()

    def fields(self, caption):
        self.append(caption)
        return {}


@pytest.fixture
def texts_of(assemble, monkeypatch):
    """texts_of(*flags, **share): the texts of the effective batches 0 to 8, 8 examples each: three epochs of 24."""

    def texts_of(*flags, rank=0, world=1):
        data = assemble(*flags).data
        data.examples.text = Texts()
        for number in range(9):
            data.examples.effective_batch(number, 8, 8, rank, world)
        return list(data.examples.text), data

    return texts_of


def test_every_sample_has_one_of_its_variants_in_every_epoch_and_not_always_the_same(texts_of):
    texts, data = texts_of(*DRAWN)
    samples, options = data.examples.latents.samples, data.examples.captions
    variants = {sample.name: [options.variant(sample.caption, i) for i in range(3)] for sample in samples}
    seen = {}
    for position, text in enumerate(texts):
        name = data.examples.name_at(position)
        assert text in variants[name] and text.startswith("inkstyle, ")
        seen.setdefault(name, []).append(text)
    assert all(len(of_sample) == 3 for of_sample in seen.values())
    assert sum(len(set(of_sample)) > 1 for of_sample in seen.values()) > 12
    assert all(variant in data.text.store for of_name in variants.values() for variant in map(content_key, of_name))


def test_the_drawn_texts_are_the_same_without_the_cache_and_on_any_number_of_processes(texts_of):
    texts, _ = texts_of(*DRAWN)
    assert texts_of(*DRAWN, "--text_cache", "none")[0] == texts
    shares = [texts_of(*DRAWN, rank=rank, world=2)[0] for rank in range(2)]
    assert [text for pair in zip(*shares) for text in pair] == texts
    assert texts_of(*DRAWN, "--seed", 7)[0] != texts


def test_what_is_held_out_is_validated_with_every_tag_in_its_place(assemble):
    data = assemble(*DRAWN, "--validation_split", 0.25).data
    data.held_out.text = Texts()
    data.held_out.validation_batches(4)
    captions = {f"inkstyle, {sample.caption}" for sample in data.held_out.latents.samples}
    assert set(data.held_out.text) == captions and all(content_key(text) in data.text.store for text in captions)


def test_the_frozen_model_is_measured_on_texts_that_are_trained(assemble):
    """With many tags the caption as it is written is hardly ever among its variants, and only these are encoded."""
    data = assemble("--shuffle_tags", "--tag_dropout", 0.3, "--caption_variants", 3).data
    data.examples.text = Texts()
    data.examples.probes([700, 800, 900])
    assert data.examples.text and all(content_key(text) in data.text.store for text in data.examples.text)


def test_a_resumed_run_draws_the_same_texts_to_the_bit(train, tmp_path):
    flags = [*DRAWN, "--max_train_steps", 4, "--checkpointing_steps", 2]
    whole = train(*flags)
    resumed = train(*flags, "--resume_from_checkpoint", whole.dir / "checkpoint-000002", into=tmp_path / "other")
    assert resumed.numbers[-2:] == whole.numbers[-2:] and resumed.same_weights(whole)


def test_caption_options_that_differ_are_named_on_resuming(train, tmp_path, capsys):
    run = train("--max_train_steps", 1, "--max_train_samples", 4)
    capsys.readouterr()
    train(
        "--max_train_steps",
        2,
        "--max_train_samples",
        4,
        "--trigger_word",
        "ink",
        "--resume_from_checkpoint",
        "latest",
        into=run.dir,
    )
    assert "resuming with --trigger_word ink, which was None" in capsys.readouterr().out
