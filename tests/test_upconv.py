"""Up-convolutional decoders: shapes, training, resuming, files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmlib import codes, descriptors, encoders, store, upconv
from fmlib.codes import Codes
from fmlib.images import ImageSet
from fmlib.upconv import Architecture, Target, Training

TINY = Architecture(base=8, cap=16, hidden=16, fully=2, convolutions=1)
QUICK = Training(size=32, steps=6, batch_size=4, validate_every=2, learning_rate=3e-3)


def pictures(count: int, *, side: int = 40, first: int = 0) -> ImageSet:
    """Smooth random pictures, each a source of its own."""
    kept = {}
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        small = torch.rand(1, 3, 5, 5, generator=generator)
        kept[f"p{number}"] = F.interpolate(small, (side, side), mode="bicubic")[0].clamp(0, 1)
    rows = [{"id": name, "group": name, "label": None, "sha256": name} for name in kept]
    return ImageSet("made", pd.DataFrame(rows), lambda row: kept[row["id"]])


class Pool(nn.Module):
    """A descriptor of the test's own: mean colours of cells of 8 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8)


@pytest.fixture
def pooled() -> Codes:
    return Codes({"pool": Pool(), "hog": descriptors.make("hog")}, ["pool", "hog"])


def equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------- architecture


def test_an_up_convolution_is_zero_insertion_and_a_convolution() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    layer = upconv._UpConvolution(3, 6, (8, 10), 5).double()
    spread = x.new_zeros(2, 3, 8, 10)
    spread[:, :, ::2, ::2] = x  # the value at the top left of its block
    kernel = layer.layer.weight.flip(2, 3).transpose(0, 1)
    expected = F.conv2d(spread, kernel, layer.layer.bias, padding=2)
    assert torch.allclose(layer(x), expected)


def test_ladder() -> None:
    assert upconv.ladder((98, 64))[:4] == [(98, 64), (49, 32), (25, 16), (13, 8)]
    assert upconv.ladder((9, 9))[-1] == (1, 1)


def test_the_published_network_for_a_vector() -> None:
    """4096, 4096, 4 x 4 x 256, up-convolutions to 256, 128, 64, 32, 3: 128 pixels (tables 7, 8)."""
    network = upconv.decoder((50,), 128, architecture=replace(upconv.PUBLISHED, hidden=8))
    widths = [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]
    assert widths == [8, 8, 4 * 4 * 256]
    channels = [m.out_channels for m in network.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert channels == [256, 128, 64, 32, 3]
    slopes = {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}


@pytest.mark.parametrize("name", encoders.packaged())
@pytest.mark.parametrize("size", [70, 98])
def test_shapes_for_every_recommended_layer(
    name: str, size: int, encoder: Callable[[str], encoders.Encoder]
) -> None:
    ends = ["fc_norm"] if name.startswith("vit") else ["logits", "probabilities"]
    layers = [*encoder(name).recommended, *ends]
    shapes = Codes(encoder(name), layers).shapes(size)
    for variant in upconv.VARIANTS:
        for layer in layers:
            network = upconv.decoder(
                shapes[layer], size, architecture=replace(TINY, variant=variant)
            )
            found = network(torch.randn(2, *shapes[layer]))
            assert found.shape == (2, 3, size, size), (variant, layer)
        bound = upconv.Autoencoder(upconv.decoder(shapes[layers[2]], size, architecture=TINY))
        assert bound(torch.rand(1, 3, size, size)).shape == (1, 3, size, size)


@pytest.mark.parametrize(("name", "contract"), [("hog", 1), ("lbp", 0), ("sift_grid", 2)])
def test_shapes_for_descriptors(name: str, contract: int) -> None:
    shape = Codes({name: descriptors.make(name)}, name).shapes((48, 64))[name]
    network = upconv.decoder(shape, (48, 64), architecture=replace(TINY, contract=contract))
    assert network(torch.rand(1, *shape)).shape == (1, 3, 48, 64)
    down = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(down) == contract


def test_a_calibrated_decoder_starts_near_the_mean_colour_whatever_the_code() -> None:
    network = upconv.decoder((6, 4, 4), 32, architecture=TINY)
    code = 1e4 * torch.rand(64, 6, 4, 4)
    code[:, 2] = 7.0  # a channel that says nothing
    images = torch.rand(64, 3, 32, 32) * torch.tensor([0.2, 1.0, 0.6])[:, None, None]
    network.calibrate(code)
    network.begin_at(images)
    with torch.no_grad():
        found = network(code)
    assert float((found.mean((0, 2, 3)) - images.mean((0, 2, 3))).abs().max()) < 0.05
    assert 1e-4 < float(found.std()) < 0.2


def test_the_logarithm_is_taken_from_its_floor_up() -> None:
    network = upconv.decoder((5,), 16, architecture=replace(TINY, logarithm=1e-3))
    p = torch.tensor([[0.9, 0.1, 1e-3, 1e-5, 0.0]])
    assert torch.equal(network(p), network(p.clamp_min(1e-3)))
    assert not torch.equal(network(p), network(p.clamp_min(1e-2)))
    above = p.clamp_min(0.01)
    assert torch.allclose(network(above), network(above / 2), atol=1e-6)  # only ratios count


def test_initial_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first, again = (upconv.decoder((4,), 16, architecture=TINY, seed=3) for _ in range(2))
    other = upconv.decoder((4,), 16, architecture=TINY, seed=4)
    assert equal(first, again)
    assert not equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------- training


def test_four_images_are_learnt_by_heart() -> None:
    """Below 5 % of the distance between two pictures."""
    four = pictures(4, side=16)
    reader = Codes({"pool": Pool()}, "pool")
    config = Training(size=16, steps=250, batch_size=4, validate_every=250, learning_rate=3e-3,
                      scale=(1.0, 1.0))  # fmt: skip
    plan = {"pool": Architecture(base=32, cap=48, convolutions=1)}
    network = upconv.train(reader, plan, four, pictures(1, first=9), config=config).decoders["pool"]
    images = four.batch(16)
    images = torch.cat([images, images.flip(3)])
    found = upconv.reconstruct(network, reader(images)["pool"])
    assert float(upconv.errors(found, images).mean()) < 0.05


def test_trained_together_is_trained_alone(pooled: Codes) -> None:
    data = pictures(10), pictures(3, first=20)
    targets = {"pool": TINY, "hog": TINY, "bound": Target("pool", TINY, autoencoder=True)}
    together = upconv.train(pooled, targets, *data, config=QUICK)
    for name, target in targets.items():
        alone = upconv.train(pooled, {name: target}, *data, config=QUICK)
        assert equal(together.decoders[name], alone.decoders[name])
        assert together.best[name] == alone.best[name]


def test_the_best_weights_are_given(pooled: Codes) -> None:
    training, held = pictures(10), pictures(3, first=20)
    result = upconv.train(pooled, {"pool": TINY}, training, held, config=replace(QUICK, steps=12))
    by_step = {entry["step"]: entry["validation"]["pool"] for entry in result.history}
    step, error = result.best["pool"]
    assert list(by_step) == [2, 4, 6, 8, 10, 12]
    assert error == min(by_step.values()) == by_step[step]
    images = held.batch(32)
    found = upconv.reconstruct(result.decoders["pool"], pooled(images)["pool"])
    assert float((found - images).square().mean()) == pytest.approx(error)


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
def test_resuming_is_the_same_as_going_on(pooled: Codes, tmp_path: Path, optimiser: str) -> None:
    data = pictures(9), pictures(3, first=20)
    targets = {"pool": TINY, "hog, autoencoder": Target("hog", TINY, autoencoder=True)}
    config = replace(QUICK, optimiser=optimiser, weight_decay=0.1, steps=7)
    whole = upconv.train(pooled, targets, *data, config=config)
    path = tmp_path / "checkpoint.safetensors"
    for stop in (3, 5, None):
        parts = upconv.train(
            pooled, targets, *data, config=config, checkpoint=path, stop_after=stop
        )
    for name in targets:
        assert equal(whole.decoders[name], parts.decoders[name])
    assert whole.history == parts.history
    assert whole.best == parts.best


def test_workers_change_nothing(pooled: Codes) -> None:
    data = pictures(9), pictures(3, first=20)
    first, second = (
        upconv.train(pooled, {"pool": TINY}, *data, config=replace(QUICK, workers=n))
        for n in (1, 3)
    )
    assert equal(first.decoders["pool"], second.decoders["pool"])


def test_an_interrupted_run_keeps_what_it_did(pooled: Codes, tmp_path: Path) -> None:
    data = pictures(9), pictures(3, first=20)
    path = tmp_path / "checkpoint.safetensors"

    def stop(step: int, _pictures: dict[str, Tensor]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upconv.train(pooled, {"pool": TINY}, *data, config=QUICK, checkpoint=path, watch=stop)
    resumed = upconv.train(pooled, {"pool": TINY}, *data, config=QUICK, checkpoint=path)
    whole = upconv.train(pooled, {"pool": TINY}, *data, config=QUICK)
    assert equal(whole.decoders["pool"], resumed.decoders["pool"])


def test_nan_stops_with_the_step_named_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            # shapes, validation, calibration, then one call a step
            Breaks.calls += 1
            code = F.avg_pool2d(x, 8)
            return code * float("nan") if Breaks.calls == 10 else code

    reader = Codes({"fine": Pool(), "breaks": Breaks()}, ["fine", "breaks"])
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(upconv.DivergedError, match=r"of 'breaks' is nan at step 5") as caught:
        upconv.train(reader, {"fine": TINY, "breaks": TINY}, pictures(9), pictures(3, first=20),
                     config=QUICK, checkpoint=path)  # fmt: skip
    assert "learning_rate" in str(caught.value)
    tensors, metadata = store.load_tensors(path)
    assert metadata["progress"]["step"] == 4
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_a_checkpoint_of_other_settings_is_refused(pooled: Codes, tmp_path: Path) -> None:
    data = pictures(9), pictures(3, first=20)
    path = tmp_path / "checkpoint.safetensors"
    upconv.train(pooled, {"pool": TINY}, *data, config=QUICK, checkpoint=path, stop_after=2)
    before = path.read_bytes()
    slower = replace(QUICK, learning_rate=1e-3)
    for targets, shown, config, differs in (
        ({"pool": TINY}, data, slower, "training"),
        ({"pool": replace(TINY, cap=8)}, data, QUICK, "targets"),
        ({"pool": TINY}, (pictures(8), data[1]), QUICK, "data"),
    ):
        with pytest.raises(store.MismatchError, match=f"'{differs}' expected"):
            upconv.train(pooled, targets, *shown, config=config, checkpoint=path)
    assert path.read_bytes() == before


def test_the_feature_loss_reaches_the_decoder(squeezenet: encoders.Encoder) -> None:
    reader = Codes(squeezenet, ["features.1", "features.4"])
    data = pictures(6, side=64), pictures(2, side=64, first=20)
    config = replace(QUICK, size=64, steps=25, validate_every=25, batch_size=4)

    def feature_error(weight: float) -> float:
        settings = replace(config, feature_weight=weight,
                           comparators=("features.4",) if weight else ())  # fmt: skip
        network = upconv.train(reader, {"features.1": TINY}, *data, config=settings)
        images = data[0].batch(64)
        with torch.no_grad():
            codes_of = reader(images)
            again = reader(
                upconv.reconstruct(network.decoders["features.1"], codes_of["features.1"])
            )
        difference = again["features.4"] - codes_of["features.4"]
        return float(difference.square().sum() / codes_of["features.4"].square().sum())

    assert feature_error(1.0) < 0.97 * feature_error(0.0)
    assert not any(p.requires_grad for p in squeezenet.parameters())


def test_pool_sees_a_fixed_number_of_crops() -> None:
    seen: set[bytes] = set()

    class Watching(nn.Module):
        differentiable = False

        def forward(self, x: Tensor) -> Tensor:
            seen.update(row.numpy().tobytes() for row in x)
            return F.avg_pool2d(x, 8)

    reader = Codes({"pool": Watching()}, "pool", remember=True)
    few = replace(QUICK, steps=40, pool=2, validate_every=40)
    upconv.train(reader, {"pool": TINY}, pictures(3), pictures(2, first=20), config=few)
    # two crops of each of three pictures, and of four in a batch the first comes twice, as another
    assert len(seen) <= 1 + 2 + 3 * 4


def test_global_random_state_is_left_alone(pooled: Codes) -> None:
    state = torch.get_rng_state()
    upconv.train(pooled, {"pool": TINY}, pictures(5), pictures(2, first=20), config=QUICK)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_input(pooled: Codes) -> None:
    data = pictures(5), pictures(2, first=20)
    with pytest.raises(ValueError, match=r"unknown code 'pol'.*did you mean 'pool'"):
        upconv.train(pooled, ["pol"], *data, config=QUICK)
    with pytest.raises(ValueError, match="no decoders"):
        upconv.train(pooled, [], *data, config=QUICK)
    with pytest.raises(ValueError, match="'p3' is a source of pictures and of validation"):
        upconv.train(pooled, ["pool"], pictures(5), pictures(2, first=3), config=QUICK)
    with pytest.raises(ValueError, match="may be empty"):
        upconv.train(pooled, ["pool"], data[0], data[1].select([]), config=QUICK)
    with pytest.raises(ValueError, match="a code is"):
        upconv.decoder((3, 4), 32)
    with pytest.raises(ValueError, match="4x4 pixels are too small"):
        upconv.decoder((3,), 4)
    network = upconv.decoder((3, 4, 4), 32, architecture=TINY)
    with pytest.raises(ValueError, match=r"takes codes \(N, 3, 4, 4\), not \(1, 3, 5, 4\)"):
        network(torch.rand(1, 3, 5, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"batch_size": True}, {"learning_rate": 0.0}, {"optimiser": "sgd"},
        {"precision": "int8"}, {"comparators": ("pool",)}, {"pool": -1}, {"weight_decay": -1.0},
    ],
)  # fmt: skip
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Training(**options)


@pytest.mark.parametrize("options", [{"variant": "unet"}, {"cap": 0}, {"logarithm": 0.0}])
def test_bad_architectures(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Architecture(**options)


# ------------------------------------------------------------------------------------------ floors


def test_nearest() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    code = torch.tensor([[5.0, 0.1], [-3.0, -2.0]])
    assert upconv.nearest(code, known, images)[:, 0, 0, 0].tolist() == [0, 2]
    assert upconv.nearest(code, known, images, k=3)[:, 0, 0, 0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="only 3 images are known"):
        upconv.nearest(code, known, images, k=4)
    with pytest.raises(ValueError, match="do not match"):
        upconv.nearest(code, known[:, :1], images)


def test_errors_are_in_units_of_the_distance_between_pictures() -> None:
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 4, 4)
    assert torch.allclose(upconv.errors(images.flip(0), images), torch.ones(2))
    assert float(upconv.errors(images, images).max()) == 0


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def made() -> upconv.Result:
    reader = Codes({"pool": Pool()}, "pool")
    plan = {"pool": TINY, "bound": Target("pool", TINY, autoencoder=True)}
    return upconv.train(reader, plan, pictures(6), pictures(2, first=20), config=QUICK)


@pytest.mark.parametrize("name", ["pool", "bound"])
def test_files_hold_half_precision(made: upconv.Result, tmp_path: Path, name: str) -> None:
    path = tmp_path / "decoder.safetensors"
    network = made.decoders[name]
    upconv.save(path, network, card={"steps": 6})
    again = upconv.load(path, origin=upconv.origin(network))
    assert type(again) is type(network)
    given = torch.rand(2, 3, 32, 32) if name == "bound" else torch.rand(2, 3, 4, 4)
    assert torch.allclose(network(given), again(given), atol=5e-3)
    assert upconv._to_image(again).card == {"steps": 6}
    size = sum(p.numel() for p in network.parameters())
    assert path.stat().st_size < 2 * size + 6000


def test_files_of_other_codes_are_refused(made: upconv.Result, tmp_path: Path) -> None:
    path = tmp_path / "decoder.safetensors"
    network = made.decoders["pool"]
    upconv.save(path, network, card={})
    other = upconv.origin(network) | {"weights": "other"}
    with pytest.raises(store.MismatchError, match=r"'origin' expected .*other"):
        upconv.load(path, origin=other)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete tensor file"):
        upconv.load(path)
    with pytest.raises(ValueError, match="was not trained"):
        upconv.save(path, upconv.decoder((3, 4, 4), 32, architecture=TINY), card={})
    with torch.no_grad():
        made.decoders["bound"].state_dict()["decoder.grow.0.layer.weight"][0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"decoder\.grow\.0\.layer\.weight.* half precision"):
        upconv.save(path, made.decoders["bound"], card={})


def source(card: dict[str, Any]) -> Any:
    name = card["origin"]["source"]
    if name == "descriptors":
        code = card["origin"]["code"]
        return {code: descriptors.make(code)}
    return encoders.load(name)


def test_the_decoders_that_come_with_the_project() -> None:
    """Each loads for its own encoder, gives pictures, and together they are small."""
    cards = upconv.trained_cards()
    assert len(cards) > 30
    files = sorted(path.name for path in upconv.folder().glob("*.safetensors"))
    assert files == sorted(cards)
    assert sum((upconv.folder() / name).stat().st_size for name in files) < 12e6
    for card in cards.values():
        name = card["origin"]["code"]
        reader = codes.Codes(source(card), name)
        network = upconv.trained(reader, name, autoencoder=card["autoencoder"])[name]
        part = upconv._to_image(network)
        assert part.code_shape == reader.shapes(part.size)[name]
        error, mean_image = card["errors"]["error"][0], card["errors"]["mean_image"][0]
        # probabilities that were cut or rounded hold too little: chapter 43
        assert 0 < error < mean_image or "probabilities|" in name, name


def test_another_network_has_no_decoders(squeezenet: encoders.Encoder) -> None:
    with pytest.raises(ValueError, match=r"no trained decoder of 'features.9' of squeezenet1_1: "
                       r"there are .*features\.12"):  # fmt: skip
        upconv.trained(Codes(squeezenet, "features.9"))


def test_a_changed_file_is_refused(
    squeezenet: encoders.Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = upconv.folder()
    reader = Codes(squeezenet, "features.1")
    name = upconv.file_name(reader.identity("features.1"))
    copied = tmp_path / "weights" / "upconv"
    copied.mkdir(parents=True)
    shutil.copy(folder / "cards.json", copied)
    monkeypatch.setenv("FMLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"squeezenet1_1--features\.1\.safetensors"):
        upconv.trained(reader)
    whole = (folder / name).read_bytes()
    (copied / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="not the file this project was checked with"):
        upconv.trained(reader)
