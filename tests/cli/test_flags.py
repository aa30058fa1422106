"""Flags: what is typed is what is trained with, and what cannot work is refused in one line before anything heavy happens."""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import List, Optional, get_args

import pytest

import infer
import train_dora
import train_opt
import train_qlora
import train_sdxl
from common.cli.command_line import Parser, parse
from common.cli.flag_checks import check
from common.cli.flag_facts import GROUPS, SHARE, default_of, flag, names_where
from common.cli.flags import ATTENTION_PROJECTIONS, TrainFlags
from common.errors import UserError

FIELDS = {field.name: field for field in dataclasses.fields(train_opt.Flags)}
SCRIPTS = [train_opt, train_sdxl]
ALL_SCRIPTS = [*SCRIPTS, train_qlora, train_dora, infer]

DOCUMENTED = {  # the table of the product, one row per flag: train_sdxl, train_opt
    "resolution": (1024, 768),
    "train_batch_size": (1, 1),
    "gradient_accumulation_steps": (4, 8),
    "lora_rank": (16, 8),
    "lora_alpha": (16, 8),
    "lora_dropout": (0, 0),
    "lora_target_modules": (["to_q", "to_k", "to_v", "to_out.0"],) * 2,
    "num_train_epochs": (10, 15),
    "max_train_steps": (2000, 3000),
    "learning_rate": (1e-4, 1e-4),
    "lr_scheduler": ("cosine", "cosine"),
    "lr_warmup_steps": (100, 150),
    "use_8bit_adam": (False, False),
    "mixed_precision": ("fp16", "fp16"),
    "gradient_checkpointing": (True, True),
    "text_cache": ("ram", "disk"),
    "min_snr_gamma": (None, 5.0),
    "offset_noise_strength": (0, 0.1),
    "use_ema": (False, True),
    "ema_decay": (0.9999, 0.9999),
    "max_grad_norm": (1.0, 1.0),
    "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.999, 0.999),
    "adam_weight_decay": (1e-2, 1e-2),
    "adam_epsilon": (1e-8, 1e-8),
    "pretrained_model_name_or_path": ("stabilityai/stable-diffusion-xl-base-1.0",) * 2,
    "variant": ("fp16", "fp16"),
    "dataset_name": ("lambdalabs/naruto-blip-captions",) * 2,
    "image_column": ("image", "image"),
    "caption_column": ("text", "text"),
}


def refusal(argv, script=train_opt):
    """The one line that `argv` gets; in this process."""
    with pytest.raises(UserError) as caught:
        script.main(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- help and defaults


@pytest.mark.parametrize("script", ["train_opt.py", "train_sdxl.py"])
def test_help_comes_without_torch(root, answer, script):
    status, said, errors = answer(root / script, "--help")
    assert (status, errors) == (0, "") and "--lora_rank" in said


def entries_of(text):
    """{name: how it is typed, its help} of a --help, line breaks undone."""
    text = re.sub(r"\n {4,}", " ", text)
    return {name: re.sub(" +", " ", entry) for name, entry in re.findall(r"^  --(\w+)(.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_the_help_shows_one_spelling_and_the_default_of_every_flag_in_100_columns(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = Parser(script.Flags).format_help()
    assert max(map(len, text.splitlines())) <= 100
    entries = entries_of(text)
    for field in dataclasses.fields(script.Flags):
        default = default_of(field)
        entry = entries[field.name]
        shown = "none" if default in (None, []) else " ".join(default) if isinstance(default, list) else str(default)
        assert entry.endswith(f"(default: {shown})"), entry
        assert f"--{field.name.replace('_', '-')} " not in entry or "_" not in field.name
        is_switch = bool in (field.type, *get_args(field.type))
        assert entry.startswith(f" / --no_{field.name} ") == is_switch
        assert len(field.metadata["help"]) > 6


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_every_flag_has_a_group_and_every_number_a_range(script):
    for field in dataclasses.fields(script.Flags):
        assert field.metadata["group"] in GROUPS and field.metadata["help"], field.name
        is_number = {int, float} & {field.type, *get_args(field.type)}
        assert bool(is_number) == ("range" in field.metadata), field.name


@pytest.mark.parametrize("facts", [dict(rnage=SHARE), dict(group="optimization"), dict(resume="never")])
def test_a_fact_that_nobody_knows_fails_where_it_is_written(facts):
    with pytest.raises((TypeError, ValueError), match=next(iter(facts))):
        flag(1, "how many", **facts)


def test_the_flags_that_a_resumed_run_may_change_without_a_word():
    free = "resume_from_checkpoint max_train_minutes output_dir save_peft export_dora_as_lora cache_dir report_to"
    assert {*free.split(), "train_batch_size", "gradient_accumulation_steps"} == set(
        names_where(train_dora.Flags, resume="free")
    )


def test_the_flags_on_which_the_memory_of_a_pass_depends():
    names = (
        "pretrained_model_name_or_path mixed_precision aspect_ratio_buckets text_cache quantize lora_rank cuda_graph"
    )
    names += " lora_target_modules lora_backend lora_dropout gradient_checkpointing train_text_encoder use_8bit_adam"
    names += " use_ema enable_xformers_memory_efficient_attention"
    for script in (*SCRIPTS, train_qlora, train_dora):
        assert set(names.split()) == set(names_where(script.Flags, changes_a_pass=True))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_defaults_are_the_documented_ones(name):
    assert tuple(getattr(parse(script.Flags, []), name) for script in (train_sdxl, train_opt)) == DOCUMENTED[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_themselves_pass_the_checks(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(parse(script.Flags, []))
    assert list(tmp_path.iterdir()) == []


def test_the_two_trainers_have_the_same_flags():
    names = [[field.name for field in dataclasses.fields(script.Flags)] for script in SCRIPTS]
    assert sorted(names[0]) == sorted(names[1])


def test_a_subclass_that_overrides_a_default_keeps_the_help_and_the_rest():
    @dataclass
    class Flags(TrainFlags):
        resolution: int = 512
        random_flip: bool = True
        lora_target_modules: List[str] = dataclasses.field(default_factory=lambda: ["to_q"])
        lora_rank: int = flag(16, "another help")
        max_train_steps: Optional[int] = 7

    own = {field.name: field for field in dataclasses.fields(Flags)}
    base = {field.name: field for field in dataclasses.fields(TrainFlags)}
    assert own["resolution"].metadata == base["resolution"].metadata
    assert own["lora_rank"].metadata == {**base["lora_rank"].metadata, "help": "another help"}
    flags = parse(Flags, [])
    assert (flags.resolution, flags.random_flip, flags.max_train_steps, flags.lora_rank) == (512, True, 7, 16)
    assert not parse(Flags, ["--no_random_flip"]).random_flip
    assert TrainFlags().resolution == 1024


def test_a_subclass_may_override_a_list_with_a_plain_list():
    """Described's promise is for every field, lists too: the new default only."""

    @dataclass
    class Flags(TrainFlags):
        lora_target_modules: List[str] = ["to_q"]  # noqa: RUF012

    assert parse(Flags, []).lora_target_modules == ["to_q"]
    assert parse(Flags, ["--lora_target_modules", "to_k", "to_v"]).lora_target_modules == ["to_k", "to_v"]
    assert parse(Flags, []).lora_target_modules is not parse(Flags, []).lora_target_modules


# ---------------------------------------------------------------- what can be typed


def values_for(field):
    default, kind = default_of(field), str(field.type)
    if isinstance(default, list):
        return ["a"]
    if "choices" in field.metadata:
        return [field.metadata["choices"][-1]]
    if "Literal" in kind:
        return [re.findall(r"'([^']+)'", kind)[-1]]
    return ["3"] if "int" in kind else ["0.5"] if "float" in kind else ["words"]


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if bool not in (field.type, *get_args(field.type))]
)
def test_underscores_and_hyphens_are_the_same_flag(name):
    value = values_for(FIELDS[name])
    underscored, hyphened = (
        parse(train_opt.Flags, [f"--{spelling}", *value]) for spelling in (name, name.replace("_", "-"))
    )
    assert underscored == hyphened
    assert getattr(underscored, name) != default_of(FIELDS[name]) or str(default_of(FIELDS[name])) == value[0]


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if bool in (field.type, *get_args(field.type)) and name != "demo"]
)
def test_every_switch_can_be_set_and_cleared_in_both_spellings(name):
    hyphened = name.replace("_", "-")
    for on in (f"--{name}", f"--{hyphened}"):
        assert getattr(parse(train_opt.Flags, [on]), name) is True
    for off in (f"--no_{name}", f"--no-{hyphened}", f"--no-{name}", f"--no_{hyphened}"):
        assert getattr(parse(train_opt.Flags, [off]), name) is False
    assert getattr(parse(train_opt.Flags, [f"--no_{name}", f"--{name}"]), name) is True  # the last one wins
    assert getattr(parse(train_opt.Flags, [f"--{name}", f"--no_{name}"]), name) is False


def test_none_can_be_typed_where_it_is_a_default_beside_choices_too():
    for name in ("prediction_type", "variant", "max_vram_gb"):
        assert getattr(parse(train_opt.Flags, [f"--{name}", "none"]), name) is None
    with pytest.raises(UserError, match="--prediction_type.*choose from"):
        parse(train_opt.Flags, ["--prediction_type", "sample"])


def test_lists_are_repeatable_and_replace_the_default():
    twice = parse(train_opt.Flags, ["--validation_prompt", "a cat", "--validation-prompt", "a dog"])
    once = parse(train_opt.Flags, ["--validation_prompt", "a cat", "a dog"])
    assert twice.validation_prompt == once.validation_prompt == ["a cat", "a dog"]
    assert parse(train_opt.Flags, ["--lora_target_modules", "to_q"]).lora_target_modules == ["to_q"]
    assert parse(train_opt.Flags, []).lora_target_modules == ATTENTION_PROJECTIONS


def test_a_flag_may_be_joined_to_its_value_by_an_equals_sign():
    assert parse(train_opt.Flags, ["--lora-rank=4", "--learning_rate=2e-5"]).lora_rank == 4


OFFERS_NONE = "min_snr_gamma max_train_steps max_train_samples checkpoints_total_limit early_stopping_patience max_train_minutes".split()


@pytest.mark.parametrize("name", [*OFFERS_NONE, "variant", "pretrained_vae_model_name_or_path"])
def test_none_unsets_a_flag_whose_help_offers_none(name):
    """Else Min-SNR, which train_opt switches on, could not be switched off, nor could --num_train_epochs ever count."""
    assert getattr(parse(train_opt.Flags, [f"--{name}", "none"]), name) is None


def test_typed_epochs_count_where_max_train_steps_is_only_a_default():
    """The study's baseline is `train_sdxl.py ... --num_train_epochs 3`: three epochs, not the default's 2,000 steps."""
    assert parse(train_sdxl.Flags, ["--num_train_epochs", "3"]).max_train_steps is None
    assert parse(train_sdxl.Flags, ["--num_train_epochs", "3", "--max_train_steps", "5"]).max_train_steps == 5


def test_dry_run_prints_the_resolved_flags_as_json_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_opt.main(["--dry_run", "--lora-rank", "4", "--no_use_ema", "--validation_prompt", "x"]) is None
    shown = json.loads(capsys.readouterr().out)
    assert shown == dataclasses.asdict(
        train_opt.Flags(dry_run=True, lora_rank=4, use_ema=False, validation_prompt=["x"])
    )
    assert list(tmp_path.iterdir()) == []


def test_demo_changes_defaults_but_not_what_was_typed(demo):
    flags = parse(train_opt.Flags, ["--demo", "--resolution", "96"])
    assert (flags.resolution, flags.train_data_dir, flags.pretrained_model_name_or_path) == (
        96,
        [str(demo.data)],
        str(demo.model),
    )
    assert (flags.lora_rank, flags.min_snr_gamma, flags.gradient_accumulation_steps) == (8, 5.0, 8)
    assert parse(train_opt.Flags, []).train_data_dir == []  # and it changes them for this call only


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "--lora_rank 0": ["--lora_rank 0", "greater than 0"],
    "--lora_alpha -1": ["--lora_alpha -1"],
    "--lora_rank four": ["lora_rank", "four"],
    "--resolution 100": ["--resolution 100", "32", "96"],
    "--resolution 32": ["--resolution 32", "64"],
    "--train_batch_size 0": ["--train_batch_size 0"],
    "--gradient_accumulation_steps 0": ["--gradient_accumulation_steps 0"],
    "--num_train_epochs 0": ["--num_train_epochs 0"],
    "--max_train_steps 0": ["--max_train_steps 0"],
    "--learning_rate 0": ["--learning_rate 0"],
    "--learning_rate nan": ["--learning_rate nan"],
    "--learning_rate inf": ["--learning_rate inf"],
    "--lr_scheduler sine": ["lr_scheduler", "sine", "cosine"],
    "--lr_warmup_steps -1": ["--lr_warmup_steps -1"],
    "--lr_num_cycles 0": ["--lr_num_cycles 0"],
    "--lr_power 0": ["--lr_power 0"],
    "--lr_scheduler polynomial --learning_rate 1e-7": ["--learning_rate 1e-07", "polynomial"],
    "--tag_dropout 1": ["--tag_dropout 1"],
    "--caption_variants 0": ["--caption_variants 0"],
    "--keep_tokens -1": ["--keep_tokens -1"],
    "--keep_tokens 2": ["--keep_tokens 2", "--shuffle_tags"],
    "--mixed_precision int4": ["mixed_precision", "int4", "fp16"],
    "--text_cache tape": ["text_cache", "tape", "disk"],
    "--report_to carrier-pigeon": ["report_to", "tensorboard"],
    "--caption_dropout 1.5": ["--caption_dropout 1.5"],
    "--caption_dropout -0.1": ["--caption_dropout -0.1"],
    "--lora_dropout 1": ["--lora_dropout 1"],
    "--ema_decay 1": ["--ema_decay 1"],
    "--min_snr_gamma 0": ["--min_snr_gamma 0"],
    "--offset_noise_strength -1": ["--offset_noise_strength -1"],
    "--offset_noise_strength nan": ["--offset_noise_strength nan"],
    "--max_train_minutes 0": ["--max_train_minutes 0"],
    "--checkpoints_total_limit 0": ["--checkpoints_total_limit 0"],
    "--checkpointing_steps -1": ["--checkpointing_steps -1"],
    "--validation_steps 0": ["--validation_steps 0"],
    "--validation_split 1": ["--validation_split 1"],
    "--early_stopping_patience 2": ["--early_stopping_patience", "--validation_split"],
    "--max_bad_images -1": ["--max_bad_images -1"],
    "--seed -1": ["--seed -1"],
    "--seed 4294967296": ["--seed 4294967296", "2^32"],
    "--output_dir=": ["--output_dir", "empty"],
    "--train_data_dir=": ["--train_data_dir", "empty"],
    "--lora_target_modules=": ["--lora_target_modules", "empty"],
    "--train_data_dir ./nowhere": ["--train_data_dir ./nowhere", "no such folder"],
    "--train_data_dir nowhere:2": ["--train_data_dir nowhere:2", "no such folder"],
    "--train_data_dir .": ["--output_dir outputs/train_opt", "--train_data_dir .", "name a folder outside"],
    "--train_data_dir nowhere": ["--train_data_dir nowhere", "no such folder"],
    "--pretrained_model_name_or_path ./nowhere": ["--pretrained_model_name_or_path ./nowhere"],
    "--pretrained_model_name_or_path nowhere.safetensors": ["--pretrained_model_name_or_path nowhere.safetensors"],
    "--pretrained_vae_model_name_or_path /nowhere/vae": ["--pretrained_vae_model_name_or_path /nowhere/vae"],
    "--resume_from_checkpoint ./nowhere": ["--resume_from_checkpoint ./nowhere"],
    "--lora_rnak 4": ["--lora_rnak", "did you mean --lora_rank?"],
    "--lora-rnak 4": ["--lora-rnak", "did you mean --lora-rank?"],
    "--learning_rat=1e-3": ["--learning_rat", "did you mean --learning_rate?"],
    "--no_use_emma": ["--no_use_emma", "did you mean --no_use_ema?"],
    "--lora_ran 4": ["--lora_ran", "did you mean --lora_rank?"],  # no silent abbreviations
    "--completely_unlike_any": ["--completely_unlike_any", "--help"],
    "stray": ["stray"],
    "--lora_rank": ["lora_rank"],
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_that_names_it(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(line.split())
    assert all(part in message for part in REFUSED[line]), message
    assert list(tmp_path.iterdir()) == []


def test_an_output_dir_that_holds_a_run_is_refused_and_left_alone(tmp_path, files_in):
    for name in ("metrics.jsonl", "pytorch_lora_weights.safetensors", "config.json"):
        (tmp_path / name).write_text("the work of a night")
    before = files_in(tmp_path)
    message = refusal(["--output_dir", str(tmp_path)])
    assert f"--output_dir {tmp_path}" in message and "--resume_from_checkpoint latest" in message
    assert files_in(tmp_path) == before


def test_an_output_dir_with_finished_weights_alone_is_not_written_over(tmp_path, files_in):
    """Nothing is written over: weights whose metrics.jsonl was not copied along are somebody's work too."""
    (tmp_path / "pytorch_lora_weights.safetensors").write_text("the work of a night")
    before = files_in(tmp_path)
    assert f"--output_dir {tmp_path}" in refusal(["--output_dir", str(tmp_path)])
    assert files_in(tmp_path) == before


def test_an_output_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    assert f"--output_dir {tmp_path / 'out'}" in refusal(["--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(flag, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{flag} {tmp_path / 'file/sub'}: {tmp_path / 'file'} is a file" in refusal(
        [flag, str(tmp_path / "file/sub")]
    )


@dataclass
class WithoutDemo:
    """A flag class that knows nothing of the trainers."""

    steps: int = flag(3, "how many")
    num_train_epochs: int = flag(1, "passes")


@dataclass
class WithDemo(WithoutDemo):
    demo: bool = flag(False, "the small one")
    steps: int = flag(3, "how many", demo=2)


@pytest.mark.parametrize("typed", ["--demo", "--no_demo", "--demo=1", "--max_train_steps 3"])
def test_a_flag_that_a_class_does_not_have_is_unknown_to_it(typed):
    with pytest.raises(UserError, match=typed.split()[0]):
        parse(WithoutDemo, typed.split())


def test_any_flag_class_works_with_the_parser():
    assert parse(WithoutDemo, ["--num_train_epochs", "4"]) == WithoutDemo(3, 4)
    assert parse(WithDemo, ["--demo"]).steps == 2
    assert parse(WithDemo, ["--demo", "--steps", "5"]).steps == 5
    assert parse(WithDemo, []).steps == 3


def test_a_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse(train_opt.Flags, ["--output_dir=~/runs"]).output_dir == "/home/somebody/runs"


def test_resuming_elsewhere_does_not_write_over_a_run(tmp_path, files_in):
    """A checkpoint of one run, and the output folder of another: their metrics would be mixed."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text("the work of a night")
    (tmp_path / "run/checkpoint-000004").mkdir(parents=True)
    argv = [
        "--output_dir",
        str(tmp_path / "other"),
        "--resume_from_checkpoint",
        str(tmp_path / "run/checkpoint-000004"),
    ]
    assert "already holds a run" in refusal(argv)


def test_a_missing_package_is_asked_for_by_name(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install wandb" in refusal(["--report_to", "wandb"])
    assert "pip install bitsandbytes" in refusal(["--use_8bit_adam"])


@pytest.mark.parametrize(
    "line", ["--lora_rank 0", "--resolutoin 512", "--train_data_dir ./nowhere", "--demo --lora_rank 0"]
)
def test_a_script_answers_bad_input_with_one_line_status_2_and_no_file(root, answer, tmp_path, line):
    """With --demo too: the demo is not built for a command that is refused."""
    (tmp_path / "work").mkdir()
    places = dict(cwd=tmp_path / "work", XDG_CACHE_HOME=str(tmp_path / "cache"))
    status, out, err = answer(root / "train_opt.py", *line.split(), **places)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("train_opt.py: error: ")
    assert line.split()[-2] in err
    assert list((tmp_path / "work").iterdir()) == [] and not (tmp_path / "cache").exists()
