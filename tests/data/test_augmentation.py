"""Buckets, flips, crops and dropped captions: each changes what it should and nothing else."""

import json
import math
import shutil

import torch


def batch_of(parts, number=0):
    """Effective batch `number` as {name of the sample: {field: tensor}}; 8 samples, none twice."""
    batches = parts.data.examples.effective_batch(number, 8, 8)
    return {
        name: {key: values[i] for key, values in batch.tensors.items()}
        for batch in batches
        for i, name in enumerate(batch.names)
    }


def test_buckets_keep_the_aspect_ratio_and_tell_the_unet(assemble):
    parts = assemble("--aspect_ratio_buckets")
    shapes = set()
    for fields in (fields for number in range(3) for fields in batch_of(parts, number).values()):
        height, width, top, left, target_height, target_width = fields["time_ids"].tolist()
        assert fields["mean"].shape == (4, target_height // 8, target_width // 8)
        assert (height > width) == (target_height > target_width) and (height < width) == (target_height < target_width)
        shapes.add(tuple(fields["mean"].shape))
    assert len(shapes) == 3
    assert {batch.tensors["mean"].shape[0] for batch in parts.data.examples.effective_batch(0, 8, 4)} <= {1, 2, 3, 4}


def test_buckets_and_squares_train_differently(train, plain):
    run = train("--max_train_steps", 3, "--aspect_ratio_buckets")
    assert all(a != b for a, b in zip(run.losses, plain.losses)) and all(math.isfinite(loss) for loss in run.losses)


def test_a_flip_mirrors_half_of_the_examples_and_leaves_the_rest_alone(assemble):
    """A flipped example has the moments of the mirrored picture and its left crop; noise, timestep and caption stay."""
    straight, flipped = assemble(), assemble("--random_flip")
    cache, mirrored = flipped.data.examples.latents, 0
    index_of = {sample.name: i for i, sample in enumerate(cache.samples)}
    for number in range(6):
        for name, a in batch_of(straight, number).items():
            b, i = batch_of(flipped, number)[name], index_of[name]
            for key in ("t", "eps", "posterior_eps", "prompt_embeds", "pooled", "keep_text", "weight"):
                assert torch.equal(a[key], b[key]), key
            if torch.equal(b["mean"], a["mean"]):
                assert torch.equal(a["time_ids"], b["time_ids"])
                continue
            mirrored += 1
            assert torch.equal(b["mean"], cache.moments(i, flip=True)[0]) and torch.equal(
                b["std"], cache.moments(i, flip=True)[1]
            )
            framing = cache.framings[i]
            assert b["time_ids"][3] == framing.resized[0] - framing.left - framing.width
            assert a["time_ids"][3] == framing.left
    assert 12 <= mirrored <= 36  # of 48


def test_a_dropped_caption_is_the_unconditional_input_and_nothing_else_changes(assemble):
    with_captions, dropped = assemble(), assemble("--caption_dropout", 0.5)
    inputs, count = [], 0
    unet = dropped.engine.unet
    unet.register_forward_pre_hook(
        lambda module, args, options: inputs.append((args[2], options["added_cond_kwargs"]["text_embeds"])),
        with_kwargs=True,
    )
    for number in range(6):
        before, after = (parts.data.examples.effective_batch(number, 8, 8)[0] for parts in (with_captions, dropped))
        assert before.names == after.names
        for key in ("t", "eps", "posterior_eps", "mean", "std", "time_ids"):
            assert torch.equal(before.tensors[key], after.tensors[key]), key
        with torch.no_grad():
            dropped.engine.predict(after.tensors)
        for keep, text, pooled, caption in zip(
            after.tensors["keep_text"], *inputs.pop(), before.tensors["prompt_embeds"]
        ):
            assert torch.equal(text, caption if keep else torch.zeros_like(caption))
            assert bool(pooled.any()) == bool(keep)
            count += not keep
    assert 12 <= count <= 36  # of 48


def test_a_model_with_an_encoded_empty_prompt_is_trained_on_that(assemble, demo, tmp_path):
    """Where the pipeline does not force zeros, its unconditional input is the empty prompt's embedding."""
    shutil.copytree(demo.model, tmp_path / "model")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    (tmp_path / "model/model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    parts = assemble("--caption_dropout", 0.5, "--pretrained_model_name_or_path", tmp_path / "model")
    zeroed = batch_of(assemble("--caption_dropout", 0.5))
    empty = parts.data.text.fields("")
    dropped = [fields for name, fields in batch_of(parts).items() if not zeroed[name]["keep_text"]]
    kept = [fields for name, fields in batch_of(parts).items() if zeroed[name]["keep_text"]]
    assert dropped and kept and empty["prompt_embeds"].any()
    for fields in dropped:
        assert fields["keep_text"] == 1 and torch.equal(fields["prompt_embeds"], empty["prompt_embeds"])
        assert torch.equal(fields["pooled"], empty["pooled"])
    assert not any(torch.equal(fields["prompt_embeds"], empty["prompt_embeds"]) for fields in kept)


def test_random_crops_differ_from_the_middle_and_are_the_same_every_time(assemble):
    middle, random, again = (batch_of(assemble(*flags)) for flags in ([], ["--no_center_crop"], ["--no_center_crop"]))
    lefts = {name: [run[name]["time_ids"][2:4].tolist() for run in (middle, random, again)] for name in middle}
    assert all(random == again for _, random, again in lefts.values())
    assert any(middle != random for middle, random, _ in lefts.values())
