from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilevd_deploy.config.presets import load_preset
from mobilevd_deploy.config.spec import DecoderSpec, ModelSpec, VaeEncoderSpec
from mobilevd_deploy.errors import UsageError
from mobilevd_deploy.model.checkpoint import open_checkpoint
from mobilevd_deploy.training import train_demo as module
from mobilevd_deploy.training.gates import inclusion_probabilities, most_important, sample_gates
from mobilevd_deploy.training.optim import Muon, orthogonalise
from mobilevd_deploy.training.train_demo import Budget, TrainingProgress, train_demo


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- gates ----


@pytest.mark.parametrize("n", [1, 5, 11, 12])
def test_probabilities_sum_to_n(n: int) -> None:
    q = 3 * torch.randn(12, generator=generator(n))
    p = inclusion_probabilities(q, n)
    assert p.sum().item() == pytest.approx(n, abs=1e-9)
    assert ((p > 0) & (p <= 1)).all()
    assert torch.equal(p.argsort(), q.argsort()) or n == 12


def test_extreme_importance_still_sums_to_n() -> None:
    q = torch.tensor([100.0, -100.0, 0.0, 0.5])
    p = inclusion_probabilities(q, 2)
    assert p.sum().item() == pytest.approx(2, abs=1e-9)
    assert p[0] == pytest.approx(1)
    assert p[1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n", [0, 5])
def test_impossible_counts_are_refused(n: int) -> None:
    with pytest.raises(ValueError):
        inclusion_probabilities(torch.zeros(4), n)


def test_gradient_of_the_probabilities_is_the_true_one() -> None:
    q = torch.randn(6, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inclusion_probabilities(x, 2), (q,))


def test_every_sample_has_n_ones_and_frequencies_match() -> None:
    p = inclusion_probabilities(2 * torch.randn(24, generator=generator(1)), 8)
    g = generator(2)
    samples = torch.stack([sample_gates(p, g) for _ in range(4000)])
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    assert (samples.sum(1) == 8).all()
    # Five standard deviations of a frequency out of 4000.
    assert (samples.mean(0) - p).abs().max() < 5 * 0.5 / 4000**0.5


def test_pairs_of_blocks_are_all_possible() -> None:
    """The random order makes them possible; plain systematic sampling would exclude some pairs."""
    p = inclusion_probabilities(torch.zeros(6), 2)
    g = generator()
    pairs = {tuple(sample_gates(p, g).nonzero().flatten().tolist()) for _ in range(500)}
    assert len(pairs) == 15


def test_straight_through_gradient_reaches_importance() -> None:
    q = torch.zeros(4, requires_grad=True)
    gates = sample_gates(inclusion_probabilities(q, 2), generator())
    (gates * torch.tensor([1.0, 0.0, 0.0, 0.0])).sum().backward()
    assert q.grad is not None
    # Block 0 helps the sum: descending raises the others at its expense, whether it was sampled or not.
    assert q.grad[0] > 0
    assert (q.grad[1:] < 0).all()
    assert q.grad.sum().item() == pytest.approx(0, abs=1e-6)


def test_most_important_keeps_order_and_breaks_ties_by_position() -> None:
    assert most_important(torch.tensor([0.0, 3.0, 1.0, 1.0, -2.0]), 2).tolist() == [1, 2]
    assert most_important(torch.zeros(5), 3).tolist() == [0, 1, 2]


# ---- optimiser ----


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 6, 6)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator())))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_muon_solves_a_small_regression_with_matrices_and_vectors() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(32, 2, 4, 4), torch.randn(32, 3)
    optimiser = Muon(net.parameters(), 0.02)
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# ---- the whole run, tiny ----

TINY_BUDGET = Budget(
    clips=6,
    autoencoder_steps=3,
    autoencoder_batch=2,
    explore_steps=3,
    finetune_steps=4,
    unet_batch=2,
    kept_temporal_blocks=3,
    pixel_share=0.5,
    save_every_s=0.0,
)


@pytest.fixture(scope="module")
def tiny_spec() -> ModelSpec:
    """The demo at a quarter of its size: two levels, four frames."""
    demo = load_preset("demo").model
    unet = dataclasses.replace(
        demo.unet,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        attention=(True, False),
        kept_temporal_blocks=None,
    )
    return dataclasses.replace(
        demo,
        frames=4,
        width=64,
        height=64,
        unet=unet,
        vae_encoder=VaeEncoderSpec("pixel-unshuffle", (8, 16), 1),
        decoder=DecoderSpec("pixel-shuffle", (8, 16), 1, 0.5),
    )


def weights(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {
        f"{name}.{key}": value
        for name in ("image_encoder", "vae_encoder", "unet", "decoder")
        for key, value in checkpoint.load(name).state_dict().items()  # type: ignore[arg-type]
    }


def train(out: Path, work: Path, spec: ModelSpec, progress: object = lambda _: None) -> ModelSpec:
    return train_demo(out, work=work, seed=3, spec=spec, budget=TINY_BUDGET, progress=progress)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_spec: ModelSpec
) -> tuple[Path, Path, ModelSpec, list[TrainingProgress]]:
    folder = tmp_path_factory.mktemp("whole")
    seen: list[TrainingProgress] = []
    stored = train(folder / "demo.safetensors", folder / "work", tiny_spec, seen.append)
    return folder / "demo.safetensors", folder / "work", stored, seen


@pytest.mark.slow
def test_the_run_writes_a_checkpoint_that_opens(
    whole: tuple[Path, Path, ModelSpec, list[TrainingProgress]],
) -> None:
    path, _, stored, seen = whole
    checkpoint = open_checkpoint(path)
    assert checkpoint.spec == stored
    kept = stored.unet.kept_temporal_blocks
    assert kept is not None
    assert len(kept) == 3
    blocks = checkpoint.load("unet").temporal_blocks()  # type: ignore[operator]
    assert [name for name, block in blocks.items() if block.time_mixer.gate == 1] == list(kept)
    assert set(kept) == set(sorted(blocks, key=checkpoint.importance().__getitem__)[-3:])
    stages = [p.stage for p in seen if p.step == p.steps]
    assert stages == ["clips", "autoencoder", "latents", "explore", "finetune"]


def test_latents_have_unit_variance_by_construction(
    whole: tuple[Path, Path, ModelSpec, list[TrainingProgress]],
) -> None:
    latents = np.load(whole[1] / "latents.npy").astype(np.float32)
    assert latents.std(axis=(0, 1, 3, 4)) == pytest.approx(np.ones(4), abs=0.02)


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("stage", ["clips", "autoencoder", "latents", "explore", "finetune"])
@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(
    stage: str,
    whole: tuple[Path, Path, ModelSpec, list[TrainingProgress]],
    tiny_spec: ModelSpec,
    tmp_path: Path,
) -> None:
    """The run stops at the report of a stage's last step, after a state was saved."""

    def stop(progress: TrainingProgress) -> None:
        if progress.stage == stage and progress.step == progress.steps:
            raise InterruptedRunError

    out = tmp_path / "demo.safetensors"
    with pytest.raises(InterruptedRunError):
        train(out, tmp_path / "work", tiny_spec, stop)
    assert not out.exists()
    train(out, tmp_path / "work", tiny_spec)
    again, first = weights(out), weights(whole[0])
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_work_folder_of_other_settings_is_refused(
    whole: tuple[Path, Path, ModelSpec, list[TrainingProgress]], tiny_spec: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="other settings"):
        train_demo(tmp_path / "x.safetensors", work=whole[1], seed=4, spec=tiny_spec, budget=TINY_BUDGET)


def test_training_shortcuts_keep_the_network_s_outputs(tiny_spec: ModelSpec) -> None:
    """One-token attention, and the pruned temporal halves left out."""
    from mobilevd_deploy.model.components import build_component
    from mobilevd_deploy.model.funnels import initialise_he

    unet_spec = dataclasses.replace(tiny_spec.unet, kept_temporal_blocks=("down_blocks.0.attentions.0",))
    unet = build_component(dataclasses.replace(tiny_spec, unet=unet_spec), "unet").double()
    initialise_he(unet, generator())
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator(1)) for shape in INPUT_SHAPES]
    with torch.no_grad():
        before = unet.denoise(*inputs)  # type: ignore[operator]
        module._for_training(unet)  # type: ignore[arg-type]
        with module._without_pruned_blocks(unet):  # type: ignore[arg-type]
            during = unet.denoise(*inputs)  # type: ignore[operator]
            paths_during = set(unet.temporal_blocks())  # type: ignore[operator]
        after = unet.denoise(*inputs)  # type: ignore[operator]
    assert paths_during == {"down_blocks.0.attentions.0"}
    assert torch.allclose(before, during, atol=1e-9)
    assert torch.allclose(before, after, atol=1e-9)


INPUT_SHAPES = ((2, 4, 4, 8, 8), (2, 4, 8, 8), (2, 64))
