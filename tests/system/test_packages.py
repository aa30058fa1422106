"""The packages: ranges that fit what the hosts have, one line for what is missing, and an old torchao that does no harm."""

import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from common.errors import UserError
from common.system import packages
from tools import bundle

SCRIPTS = ("train_sdxl", "train_opt", "train_qlora", "train_dora", "infer")


def requirements(path):
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return {requirement.name: requirement.specifier for requirement in map(Requirement, filter(None, lines))}


def test_the_file_and_the_module_name_the_same_ranges(root):
    assert requirements(root / "requirements.txt") == {
        name: Requirement(name + r).specifier for name, r in packages.REQUIREMENTS.items()
    }


@pytest.mark.parametrize("host", ["kaggle", "colab"])
def test_a_host_lacks_two_packages_and_has_every_other_in_its_range(root, host):
    installed = requirements(root / "hosts" / f"{host}.txt")
    assert packages.REQUIREMENTS.keys() - installed.keys() == {"argparse-dataclass", "bitsandbytes"}
    for name in packages.REQUIREMENTS.keys() & installed.keys():
        (pin,) = installed[name]
        assert Requirement(name + packages.REQUIREMENTS[name]).specifier.contains(pin.version), f"{name} {pin.version}"
    assert "0.10.0" in str(installed["torchao"])


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("bundled", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_packages_gets_one_line_that_names_them(root, tmp_path, script, bundled):
    file = root / f"{script}.py"
    if bundled:
        file = tmp_path / f"{script}.py"
        file.write_text(bundle.bundle(script))
    process = subprocess.run([sys.executable, "-S", file, "--demo"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and process.stderr.count("\n") == 1
    for part in (
        f"{script}.py: error: ",
        "argparse-dataclass is missing",
        ' "argparse-dataclass>=2.0,<3"',
        ' "diffusers>=',
    ):
        assert part in process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "name", ["diffusers", "transformers", "peft", "accelerate", "datasets", "psutil", "matplotlib", "pillow"]
)
def test_a_missing_package_is_refused_before_anything_is_written(monkeypatch, tmp_path, script, name):
    monkeypatch.setattr(packages, "is_absent", lambda package: package == name)
    with pytest.raises(UserError) as caught:
        __import__(script).main(["--demo", "--output_dir", str(tmp_path / "run")])
    assert str(caught.value) == f'{name} is missing: pip install "{name}{packages.REQUIREMENTS[name]}"'
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "version", "refused"),
    [
        ("torch", "2.5.1+cu124", True),
        ("torch", "2.6.0", False),
        ("torch", "2.10.0+cu128", False),
        ("transformers", "4.57.6", True),
    ],
)
def test_a_package_below_its_floor_is_refused(monkeypatch, name, version, refused):
    monkeypatch.setattr(packages, "installed_version", {name: version}.get)
    assert packages.lacking() == ({name: version} if refused else {})


def test_a_package_above_its_range_may_be_tried(monkeypatch):
    monkeypatch.setattr(packages, "installed_version", {"diffusers": "0.99.0"}.get)
    assert packages.lacking() == {}


# ---------------------------------------------------------------- torchao


def test_an_adapter_can_be_added_beside_the_torchao_of_the_hosts(monkeypatch, tmp_path):
    """PEFT raises ImportError for a torchao older than 0.16, whether or not anything would use it."""
    from peft import LoraConfig, import_utils, inject_adapter_in_model
    from torch import nn

    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_utils.is_torchao_available.cache_clear()
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    assert model[0].lora_A["default"].weight.shape == (2, 4)
    import_utils.is_torchao_available.cache_clear()
