"""The UNet with shorter forward passes is diffusers' UNet, and what it does not know it leaves alone."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from common.fast.frozen_layers import _FrozenConv, forwards, fuse_unet, unfuse_unet
from common.model import adapters
from common.train.pass_plan import BlockRecompute

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def unet(demo):
    return UNet2DConditionModel.from_pretrained(demo.model, subfolder="unet").requires_grad_(False)


def run_of(unet):
    """(prediction, gradients of image, text and size conditioning) for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    width, pooled_width = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim
    x, text = new(2, 4, 8, 16), new(2, 77, width)
    pooled = new(2, pooled_width - 6 * unet.config.addition_time_embed_dim)
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    prediction = unet(x, torch.tensor([3, 700]), text, added_cond_kwargs=conditions, return_dict=False)[0]
    prediction.backward(torch.randn(prediction.shape, generator=generator))
    return [prediction.detach(), x.grad, text.grad, pooled.grad]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_predictions_and_gradients_are_those_of_diffusers(unet):
    """The gradient with respect to the pooled text takes the way through the time embedding of every resnet block."""
    fused = copy.deepcopy(unet)
    fuse_unet(fused, CPU)
    assert {type(module) for module in fused.modules() if "forward" in vars(module)} == set(forwards())
    assert_close(run_of(fused), run_of(unet))


def test_a_block_recomputed_in_the_backward_pass_gives_the_same(unet):
    fused = copy.deepcopy(unet).train()
    fuse_unet(fused, CPU)
    recompute = BlockRecompute()
    fused.enable_gradient_checkpointing(recompute)
    recompute.kept = {fused.mid_block.resnets[1]}
    assert_close(run_of(fused), run_of(unet))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"), [(3, 1, 1, 8), (3, 2, 1, 8), (3, 2, 1, 7), (1, 1, 0, 5)]
)
def test_the_gradient_of_a_frozen_convolution_needs_no_input(kernel, stride, padding, size):
    """As a GPU computes it; a CPU leaves it to PyTorch."""
    conv = torch.nn.Conv2d(6, 10, kernel, stride, padding).requires_grad_(False)
    x = torch.randn(2, 6, size, 9, requires_grad=True)
    (y := conv(x)).backward(dy := torch.randn_like(y))
    again = x.detach().requires_grad_()
    (found := _FrozenConv.apply(again, conv, conv.bias)).backward(dy)
    assert torch.equal(found, y) and (again.grad - x.grad).norm() < 1e-6 * x.grad.norm()


def test_every_layer_gets_its_own_forward_pass_back(unet):
    fused = copy.deepcopy(unet)
    fuse_unet(fused, CPU)
    unfuse_unet(fused)
    assert not [name for name, module in fused.named_modules() if "forward" in vars(module)]
    assert_close(run_of(fused), run_of(unet))


def test_an_adapted_convolution_keeps_its_adapter(unet):
    """Adapter files may have some; a fused block would read the frozen weight past them."""
    torch.manual_seed(0)
    plain = copy.deepcopy(unet)
    plain.add_adapter(LoraConfig(r=4, target_modules=["conv1", "to_q"], init_lora_weights=False))
    fused = copy.deepcopy(plain)
    fuse_unet(fused, CPU)
    expected = run_of(plain)
    assert_close(run_of(fused), expected)
    assert (run_of(unet)[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


def test_without_dropout_is_only_while_it_lasts():
    modules = [torch.nn.Dropout(0.5), torch.nn.Dropout(0.5).eval()]
    with pytest.raises(KeyboardInterrupt), adapters.without_dropout(modules):
        assert not modules[0].training and not modules[1].training
        raise KeyboardInterrupt
    assert modules[0].training and not modules[1].training
