"""Trained maps: symmetries, the paper's numbers, stopping, exact resuming; all on a CPU, small."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmlib import maps, store, trained_maps
from fmlib.maps import Origin
from fmlib.trained_maps import Plateau, TrainingConfig

SMALL = {"width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
QUICK = TrainingConfig(
    epochs=4, batch_size=8, accumulate=1, learning_rate=1e-2, validation_share=0.25
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(images=24, channels=4, side=3, *, seed=0):
    x = randn(images, channels, side, side, seed=seed) + 2
    weight = randn(channels, channels, seed=seed + 1)
    return x, torch.einsum("oc,nchw->nohw", weight, x)


def network(family, channels=4, grid=(3, 3), **options):
    return trained_maps.architecture(family, (channels, channels), grid, **options).eval()


# ----------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("trained_linear", 1.05e6),
        ("mlp", 1.05e6),
        ("cnn", 9.4e6),
        ("transformer", 9.5e6),
    ],
)
def test_parameter_counts_are_the_papers(family, parameters):
    with torch.device("meta"):
        net = trained_maps.architecture(family, (1024, 1024), (9, 9))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("family", trained_maps.FAMILIES)
def test_initial_weights_are_the_seeds(family):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (network(family, seed=seed, **SMALL).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def permuted(x, order):
    return x.flatten(2)[..., order].view_as(x)


@pytest.mark.parametrize("positions", trained_maps.POSITIONS)
def test_a_transformer_without_positions_is_permutation_equivariant(positions):
    net = network("transformer", positions=positions, **SMALL)
    x, order = randn(2, 4, 3, 3), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        apart = (net(permuted(x, order)) - permuted(net(x), order)).abs().max()
    assert (float(apart) < 1e-5) == (positions == "none")


@pytest.mark.parametrize(("family", "reach"), [("trained_linear", 0), ("mlp", 0), ("cnn", 2)])
def test_reach_of_each_family(family, reach):
    net = network(family, grid=(9, 9), **SMALL)
    x = randn(1, 4, 9, 9).requires_grad_()
    net(x)[0, :, 4, 4].sum().backward()
    assert x.grad is not None
    rows = (x.grad[0].abs().sum(0) > 0).any(1).nonzero().flatten().tolist()
    assert rows == list(range(4 - reach, 5 + reach))


def test_sinusoidal_positions():
    codes = trained_maps.sinusoidal_positions(8, (3, 5))
    assert codes.shape == (15, 8)
    assert len(torch.unique(codes, dim=0)) == 15
    # column 3 of row 2: sines and cosines of the row at rates 1 and 1/100, then of the column
    wanted = [*np.sin([2, 0.02]), *np.cos([2, 0.02]), *np.sin([3, 0.03]), *np.cos([3, 0.03])]
    assert codes[2 * 5 + 3].tolist() == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="that 4 divides, not 6"):
        trained_maps.sinusoidal_positions(6, (2, 2))


def test_sinusoidal_positions_fit_other_grids_learned_ones_do_not():
    assert network("transformer", positions="sinusoidal", **SMALL)(randn(1, 4, 5, 4)).shape[2:] == (
        5,
        4,
    )
    with pytest.raises(ValueError, match="3x3 grid, not of 5x4"):
        network("transformer", positions="learned", **SMALL)(randn(1, 4, 5, 4))


def test_architectures_are_checked():
    with pytest.raises(ValueError, match="did you mean 'transformer'"):
        network("transformers")
    with pytest.raises(ValueError, match="did you mean 'learned'"):
        network("transformer", positions="learn")
    with pytest.raises(ValueError, match="not for cnn"):
        network("cnn", positions="learned")
    with pytest.raises(ValueError, match="3 heads do not divide"):
        network("transformer", width=16, heads=3)


# -------------------------------------------------------------------------------------------- loss


def test_loss_is_the_papers():
    prediction, target = randn(3, 5, 2, 2), randn(3, 5, 2, 2, seed=1)
    medians = []
    for p, t in zip(prediction, target, strict=True):
        a, b = p.flatten(1).T.numpy(), t.flatten(1).T.numpy()
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        medians.append(np.sort(cosine)[4 // 2])
    mse = float((prediction - target).square().mean())
    wanted = 0.3 * mse + 0.7 * (1 - np.mean(medians))
    assert float(trained_maps.loss(prediction, target)) == pytest.approx(wanted, rel=1e-5)
    plain = trained_maps.loss(prediction, target, mse_weight=1, cosine_weight=0)
    assert float(plain) == pytest.approx(mse)


def test_loss_has_finite_gradients_at_the_target():
    prediction = randn(2, 3, 2, 2).requires_grad_()
    trained_maps.loss(prediction, prediction.detach()).backward()
    assert prediction.grad is not None
    assert bool(torch.isfinite(prediction.grad).all())


# ------------------------------------------------------------------------------- stopping, schedule


def watch(config, losses):
    """Rates after each epoch until training stops."""
    plateau, rate, rates = Plateau(config), config.learning_rate, []
    for value in losses:
        rate, stopped = plateau.step(value, rate)
        rates.append(rate)
        if stopped:
            break
    return rates


def test_early_stopping_fires():
    losses = [1.0, 0.5, *[0.5] * 20]
    assert len(watch(TrainingConfig(), losses)) == 2 + 6
    falling = [1 - 0.01 * i for i in range(50)]
    assert len(watch(TrainingConfig(), falling)) == 50
    crawling = [1 - 0.0001 * i for i in range(50)]  # by less than min_delta
    assert len(watch(TrainingConfig(), crawling)) < 15


def test_scheduler_fires_before_training_stops():
    rates = watch(TrainingConfig(), [1.0] * 20)
    assert rates == [1e-4] * 4 + [5e-5] * 3
    # progress at the lower rate keeps training alive
    rates = watch(TrainingConfig(), [1.0] * 6 + [0.5] * 20)
    assert rates == [1e-4] * 4 + [5e-5] * 6 + [2.5e-5] * 3


def test_scheduler_is_torchs():
    config = TrainingConfig(patience=1000, scheduler_patience=2)
    losses = (1 + 0.2 * randn(60)).tolist()
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimiser, patience=2, factor=0.5, min_lr=1e-6, threshold=1e-3, threshold_mode="abs", eps=0
    )
    wanted = []
    for value in losses:
        oracle.step(value)
        wanted.append(optimiser.param_groups[0]["lr"])
    assert watch(config, losses) == pytest.approx(wanted)
    assert min(wanted) == pytest.approx(1e-6)


def test_the_released_patiences_are_refused():
    with pytest.raises(ValueError, match=r"scheduler_patience 8 must be .* below patience 6"):
        TrainingConfig(scheduler_patience=8)
    assert watch(TrainingConfig(scheduler_patience=None), [1.0] * 20) == [1e-4] * 7


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"validation_share": 1.0}, "below 1"),
        ({"precision": "float15"}, "did you mean 'float16'"),
    ],
)
def test_configuration_is_checked(option, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**option)


def test_defaults_are_the_papers():
    found = dataclasses.asdict(TrainingConfig())
    paper = {
        "mse_weight": 0.3, "cosine_weight": 0.7, "learning_rate": 1e-4, "weight_decay": 1e-4,
        "batch_size": 32, "accumulate": 2, "epochs": 100, "patience": 6, "min_delta": 1e-3,
        "factor": 0.5, "min_learning_rate": 1e-6, "validation_share": 0.05, "checkpoint_every": 2,
    }  # fmt: skip
    assert {k: found[k] for k in paper} == paper


# ----------------------------------------------------------------------------------------- training


def test_split_keeps_groups_together():
    groups = [i // 3 for i in range(30)]
    training, validation = trained_maps.split(groups, 0.2)
    assert len(validation) == 6
    assert not {groups[i] for i in training} & {groups[i] for i in validation}
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(30))
    assert len(trained_maps.split([0, 1], 0.9)[0]) == 1
    with pytest.raises(ValueError, match="1 group of images"):
        trained_maps.split([3, 3, 3], 0.2)


@pytest.mark.parametrize("family", trained_maps.FAMILIES)
def test_one_interface(family, tmp_path):
    x, y = pairs()
    origin = Origin("tiny", "abc", "features.3", "blur")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fitted = maps.fit(family, (x, y), config=QUICK, grid_action="rot90", origin=origin, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]
    assert fitted.apply(x).shape == y.shape
    assert torch.equal(fitted.apply(x[:3]), fitted.apply(x[:3]))  # no dropout, no batch statistics
    assert fitted.parameters_count == sum(p.numel() for p in fitted.network.parameters())
    watched = x.clone().requires_grad_()
    fitted.apply(watched).sum().backward()
    assert watched.grad is not None
    assert not any(p.requires_grad for p in fitted.network.parameters())
    fitted.save(tmp_path / "map.safetensors")
    back = maps.load(tmp_path / "map.safetensors", family=family, layer="features.3")
    assert torch.equal(back.apply(x), fitted.apply(x))
    assert back.history == fitted.history
    assert back.info == fitted.info
    with pytest.raises(store.MismatchError, match="'edit' expected 'hue', found 'blur'"):
        maps.load(tmp_path / "map.safetensors", edit="hue")
    with pytest.raises(ValueError, match="takes 4 channels, not 3"):
        back.apply(x[:, :3])


def test_trained_linear_approaches_the_closed_form():
    x, y = pairs(60)
    x, y = x - 2, y - y.mean((0, 2, 3), keepdim=True)
    config = TrainingConfig(
        epochs=60, batch_size=8, accumulate=1, learning_rate=5e-2, weight_decay=0.0,
        validation_share=0.1, mse_weight=1.0, cosine_weight=0.0, min_delta=1e-6,
    )  # fmt: skip
    trained = maps.fit("trained_linear", (x, y), config=config)
    assert float((trained.apply(x) - y).square().mean() / y.var()) < 1e-3
    closed = maps.fit("linear", (x.double(), y.double()))
    assert torch.allclose(trained.apply(x), closed.apply(x.double()).float(), atol=0.15)


def test_only_the_positions_can_learn_where():
    """A target that depends on the place alone: a transformer without positions cannot say it."""
    x = randn(60, 4, 3, 3)
    y = randn(1, 4, 3, 3, seed=7).expand(60, -1, -1, -1).contiguous()
    config = dataclasses.replace(QUICK, epochs=15, mse_weight=1.0, cosine_weight=0.0)
    errors = {
        kind: float((maps.fit("transformer", (x, y), config=config, positions=kind, **SMALL)
                     .apply(x) - y).square().mean() / y.var())
        for kind in ("none", "sinusoidal")
    }  # fmt: skip
    assert errors["none"] > 0.5
    assert errors["sinusoidal"] < 0.2


@pytest.mark.parametrize("family", ["cnn", "transformer"])
def test_resumed_is_uninterrupted(family, tmp_path):
    x, y = pairs()
    options = {**SMALL, "dropout": 0.3, "config": dataclasses.replace(QUICK, accumulate=2)}
    whole = trained_maps.train(family, x, y, **options)
    path = tmp_path / "checkpoint.safetensors"
    part = trained_maps.train(family, x, y, checkpoint=path, stop_after=2, **options)
    assert part.info["epochs"] == 2
    torch.manual_seed(99)
    rest = trained_maps.train(family, x, y, checkpoint=path, **options)
    assert rest.history == whole.history
    assert torch.equal(rest.apply(x), whole.apply(x))
    again = trained_maps.train(family, x, y, checkpoint=path, **options)  # nothing left to do
    assert torch.equal(again.apply(x), whole.apply(x))


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    seen = []
    plain = trained_maps._Run._loss

    def watched(self, x, y, index, scales):
        if self.network.training:
            seen.append((self.epoch, index.tolist()))
        return plain(self, x, y, index, scales)

    monkeypatch.setattr(trained_maps._Run, "_loss", watched)
    x, y = pairs(32)
    config = dataclasses.replace(QUICK, epochs=2)
    trained_maps.train("mlp", x, y, config=config, groups=[i // 2 for i in range(32)], **SMALL)
    first, second = ([i for e, index in seen if e == epoch for i in index] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(first) == 24  # three full batches, each image once
    held = set(range(32)) - set(first)
    assert {i // 2 for i in held} & {i // 2 for i in first} == set()


def test_checkpoint_of_something_else_is_refused(tmp_path):
    x, y = pairs()
    path = tmp_path / "checkpoint.safetensors"
    trained_maps.train("mlp", x, y, config=QUICK, checkpoint=path, stop_after=1, **SMALL)
    with pytest.raises(store.MismatchError, match="architecture"):
        trained_maps.train("cnn", x, y, config=QUICK, checkpoint=path, **SMALL)
    other = dataclasses.replace(QUICK, seed=1)
    with pytest.raises(store.MismatchError, match="training"):
        trained_maps.train("mlp", x, y, config=other, checkpoint=path, **SMALL)
    with pytest.raises(store.MismatchError, match="data"):
        trained_maps.train("mlp", x, y + 1, config=QUICK, checkpoint=path, **SMALL)


def test_training_stops_early_and_keeps_the_best():
    x = randn(24, 4, 3, 3)
    y = randn(24, 4, 3, 3, seed=1)  # nothing to learn: validation soon rises
    config = dataclasses.replace(QUICK, epochs=60, learning_rate=3e-2)
    fitted = trained_maps.train("mlp", x, y, config=config, width=64, dropout=0.0)
    assert fitted.info["stopped_early"]
    assert fitted.info["epochs"] < 60
    losses = [entry["validation_loss"] for entry in fitted.history]
    assert fitted.info["best_epoch"] == int(np.argmin(losses))
    assert fitted.history[-1]["learning_rate"] < config.learning_rate
    held = trained_maps.split(list(range(24)), 0.25)[1]
    mean, std = fitted.mean[:, None, None], fitted.std[:, None, None]
    value = trained_maps.loss(((fitted.apply(x[held]) - mean) / std), (y[held] - mean) / std)
    assert float(value) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(precision):
    x, y = pairs()
    config = dataclasses.replace(QUICK, precision=precision)
    fitted = trained_maps.train("mlp", x, y, config=config, **SMALL)
    full = trained_maps.train("mlp", x, y, config=QUICK, **SMALL)
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]
    assert fitted.history[0]["train_loss"] == pytest.approx(full.history[0]["train_loss"], rel=0.05)
    assert fitted.history != full.history
    assert all(p.dtype == torch.float32 for p in fitted.network.parameters())


def test_normalisation_is_undone():
    x, y = pairs()
    x, y = 1e3 * x + 5e3, 1e3 * y + 5e3
    x[:, 1], y[:, 1] = 0, 0  # a channel that is never on
    fitted = trained_maps.train("trained_linear", x, y, config=QUICK)
    assert fitted.std[1] == 1
    training, _ = trained_maps.split(list(range(24)), QUICK.validation_share)
    assert torch.allclose(fitted.mean, x[training].mean((0, 2, 3)))
    shown = (x - fitted.mean[:, None, None]) / fitted.std[:, None, None]
    inner = fitted.network(shown).detach()
    wanted = inner * fitted.std[:, None, None] + fitted.mean[:, None, None]
    assert torch.allclose(fitted.apply(x), wanted)
    plain = dataclasses.replace(QUICK, normalise=False)
    assert torch.equal(
        trained_maps.train("mlp", *pairs(), config=plain, **SMALL).std, torch.ones(4)
    )


def test_between_encoders_of_different_widths():
    x, y = pairs()
    fitted = trained_maps.train("mlp", x, y[:, :3], config=QUICK, **SMALL)
    assert fitted.apply(x).shape == (24, 3, 3, 3)
    assert torch.allclose(fitted.mean_y, y[:, :3][trained_maps.split(
        list(range(24)), QUICK.validation_share)[0]].mean((0, 2, 3)), atol=1e-5)  # fmt: skip


def test_batches_that_are_not_full_are_dropped_but_never_all():
    x, y = pairs(9)
    config = dataclasses.replace(QUICK, batch_size=64, epochs=1)
    before = trained_maps.architecture("mlp", (4, 4), (3, 3), **SMALL)
    fitted = trained_maps.train("mlp", x, y, config=config, **SMALL)
    after = fitted.network.state_dict()
    assert any(not torch.equal(v, after[k]) for k, v in before.state_dict().items())


def test_a_loss_that_is_no_number_is_an_error():
    x, y = pairs()
    wild = dataclasses.replace(QUICK, learning_rate=1e30, epochs=5)
    with pytest.raises(trained_maps.DivergedError, match=r"epoch \d at learning rate 1e\+30"):
        trained_maps.train("mlp", x, y, config=wild, **SMALL)


def test_bad_pairs_are_refused():
    x, y = pairs()
    holed = x.clone()
    holed[5, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="x of image 5 is not finite"):
        trained_maps.train("mlp", holed, y)
    with pytest.raises(ValueError, match="same pictures on one grid"):
        trained_maps.train("mlp", x, y[:5])
    with pytest.raises(ValueError, match="same pictures on one grid"):
        trained_maps.train("mlp", x, F.pad(y, (1, 0)))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        trained_maps.train("mlp", x[..., 0, 0], y[..., 0, 0])
    with pytest.raises(ValueError, match="square grid"):
        trained_maps.train("mlp", x[..., :2], y[..., :2], grid_action="rot90")
    with pytest.raises(ValueError, match="groups has 2 entries for 24"):
        trained_maps.train("mlp", x, y, groups=[0, 1])
