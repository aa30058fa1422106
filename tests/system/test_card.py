"""Cards that PyTorch cannot compute on, and the memory that a run may take; torch.cuda is a stand-in here."""

from types import SimpleNamespace

import pytest
import torch

import train_opt
from common.cli import command_line, running
from common.data import dataset
from common.model import device, loading
from common.model.device import GIB
from common.system.cards import unsupported_card
from common.train import assembly, pass_plan

CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "built_for", "works"),
    [
        ((6, 0), CU128, False),
        ((7, 5), CU128, True),
        ((8, 9), CU128, True),  # by code for 8.6
        ((7, 5), ["sm_80", "sm_90"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_90", "compute_90"], True),  # the driver compiles the intermediate code
        ((6, 0), ["compute_70"], False),
        ((9, 0), ["gfx90a"], True),  # another maker's, not judged
    ],
)
def test_a_card_works_when_there_is_code_for_it(capability, built_for, works):
    fault = unsupported_card("some card", capability, built_for)
    assert (fault is None) == works


@pytest.fixture
def cuda(monkeypatch):
    """A Tesla P100 of 16 GiB, of which 2 are in use, and the fractions that memory was held to."""
    process = SimpleNamespace(device=torch.device("cuda", 0), process_index=0, num_processes=1)
    fractions = []
    stand_ins = dict(
        get_device_name=lambda device: "Tesla P100-PCIE-16GB",
        get_device_capability=lambda device: (6, 0),
        get_arch_list=lambda: CU128,
        reset_peak_memory_stats=lambda device: None,
        empty_cache=lambda: None,
        mem_get_info=lambda device: (14 * GIB, 16 * GIB),
        memory_reserved=lambda device: 0,
        get_device_properties=lambda device: SimpleNamespace(total_memory=16 * GIB),
        set_per_process_memory_fraction=lambda fraction: fractions.append(fraction),
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(device, "PartialState", lambda **options: process)
    host = device.Host(process.device, torch.float16, reason="", rank=0, world=1, started_s=0.0)
    return SimpleNamespace(fractions=fractions, host=host)


@pytest.mark.parametrize("script", ["train_opt", "infer"])
def test_a_p100_is_one_line_before_anything_is_read_or_encoded(cuda, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "load_samples", lambda *given: pytest.fail("pictures were read"))
    monkeypatch.setattr(loading, "find_model", lambda *given: pytest.fail("a model was looked for"))
    main = __import__(script).main
    with pytest.raises(SystemExit) as ended:
        running.run(lambda: main(["--demo", "--output_dir", str(tmp_path / "out")]))
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert ended.value.code == 2 and "Tesla P100-PCIE-16GB (sm_60)" in line and "Kaggle: choose GPU T4 x2" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("max_gib", "limit_gib"), [(None, 14.0), (6.5, 6.5), (15.0, 14.0)])
def test_memory_is_held_to_what_was_asked_for_or_is_free(cuda, max_gib, limit_gib):
    assert device.limit_memory(cuda.host.device, max_gib) == limit_gib
    assert cuda.fractions == [limit_gib / 16]


@pytest.mark.parametrize("typed", [[], ["--no_auto_fit"]], ids=["measured", "not measured"])
def test_max_vram_gb_holds_from_before_the_first_picture_is_read(cuda, monkeypatch, typed):
    def read(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "load_samples", read)
    flags = command_line.parse(train_opt.Flags, ["--max_vram_gb", "6.5", *typed])
    with pytest.raises(KeyboardInterrupt):
        assembly.load_data(flags, cuda.host)
    assert cuda.fractions == [6.5 / 16]


def test_measuring_says_what_it_does_and_for_how_long_before_it_starts(monkeypatch):
    def probe(*given):
        raise KeyboardInterrupt

    lines = []
    monkeypatch.setattr(pass_plan, "_probe", probe)
    engine = SimpleNamespace(host=SimpleNamespace(say=lines.append))
    with pytest.raises(KeyboardInterrupt):
        pass_plan._measure(engine, lambda size: [None], 4, 10.0)
    assert len(lines) == 1 and "measuring" in lines[0] and "minute" in lines[0]
