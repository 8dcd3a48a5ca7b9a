"""Surgery keeps what it should keep, and shifts do what the papers say."""

import copy
import dataclasses

import pytest
import torch
from PIL import Image
from torch import nn

from fmlib import antialias, encoders, extract, images, store, taps
from fmlib.encoders import Encoder


def strided_net(pool: nn.Module | None = None) -> Encoder:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        pool if pool is not None else nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return Encoder(net, name="strided", input_size=64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rect2", [1, 1]), ("tri3", [1, 2, 1]), ("bin5", [1, 4, 6, 4, 1])],
)
def test_kernels_of_zhang(name, expected):
    kernel = antialias.kernel1d(name, 2)
    torch.testing.assert_close(kernel, torch.tensor(expected).double() / sum(expected))


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("name", list(antialias.KERNELS))
def test_kernels_cancel_the_new_sampling_frequency(name, stride):
    kernel = antialias.kernel1d(name, stride)
    phase = torch.exp(2j * torch.pi * torch.arange(len(kernel)).double() / stride)
    assert abs((kernel * phase).sum()) < 1e-12
    assert kernel.sum() == pytest.approx(1)


POOLS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4),
    nn.Conv2d(4, 6, 3, stride=2),
    nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.MaxPool2d(3, 2),
    nn.MaxPool2d(3, 2, ceil_mode=True),
    nn.MaxPool2d(2, 2, ceil_mode=True),
    nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    nn.AvgPool2d(2, 2),
    antialias.Conv2dSame(4, 6, 3, stride=2),
    antialias.Conv2dSame(4, 6, 5, stride=3),
    antialias.MaxPool2dSame(3, 2),
]


@pytest.mark.parametrize("size", [16, 17, 19])
@pytest.mark.parametrize("layer", POOLS, ids=lambda m: type(m).__name__)
def test_dense_output_is_aligned_with_the_layer(layer, size):
    x = torch.rand(2, 4, size, size + 2)
    part = antialias.Subsampler(layer, "layer")
    (sy, sx) = part.stride
    torch.testing.assert_close(part.dense(x)[..., ::sy, ::sx], layer(x))
    blurred = antialias.BlurPool(layer, "layer", kernel="tri3")(x)
    assert blurred.shape == layer(x).shape


def test_blur_leaves_smooth_signals_alone_and_removes_the_checkerboard():
    layer = nn.Conv2d(1, 1, 1, stride=2, bias=False)
    nn.init.ones_(layer.weight)
    pool = antialias.BlurPool(layer, "layer", kernel="tri3")
    constant = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(pool(constant), layer(constant))
    board = (torch.arange(16)[:, None] + torch.arange(16)).fmod(2)[None, None].float()
    assert layer(board).unique().numel() == 1
    torch.testing.assert_close(pool(board), torch.full((1, 1, 8, 8), 0.5))


def test_blurpool_copies_and_keeps_names(random_image_batch):
    encoder = strided_net()
    before = encoder(random_image_batch)
    changed = antialias.blurpool(encoder)
    torch.testing.assert_close(encoder(random_image_batch), before)
    assert changed.weight_hash != encoder.weight_hash
    assert antialias.strided(encoder) == ["0", "3", "4"]
    shapes = [
        {
            name: value.shape
            for name, value in taps.features(e, random_image_batch, ["0", "4"]).items()
        }
        for e in (encoder, changed)
    ]
    assert shapes[0] == shapes[1]
    only = antialias.blurpool(encoder, layers=["3"])
    assert isinstance(only.net.get_submodule("3"), antialias.BlurPool)
    assert not isinstance(only.net.get_submodule("0"), antialias.BlurPool)


def test_blurpool_lowers_the_change_under_a_pixel_shift(random_image_batch):
    encoder = strided_net()

    def change(e: Encoder) -> float:
        moved = random_image_batch.roll(1, -1)
        x, y = (taps.features(e, images, ["5"])["5"] for images in (random_image_batch, moved))
        return float((x - y).norm() / x.norm())

    assert change(antialias.blurpool(encoder, kernel="bin5")) < 0.8 * change(encoder)


@pytest.fixture(scope="module")
def random_image_batch() -> torch.Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["strided", "random:timm:resnet18", "random:squeezenet1_1"])
def test_polyphase_is_exactly_consistent_under_circular_shifts(name, random_image_batch):
    encoder = strided_net() if name == "strided" else encoders.load(name)
    changed = antialias.polyphase(encoder)
    plain, reference = encoder(random_image_batch), changed(random_image_batch)
    scale = reference.abs().max()
    moved_plain = False
    for dy, dx in [(0, 1), (1, 0), (3, 5), (17, 2), (32, 31)]:
        moved = random_image_batch.roll((dy, dx), (-2, -1))
        assert float((changed(moved) - reference).abs().max() / scale) < 1e-4
        moved_plain |= float((encoder(moved) - plain).abs().max() / plain.abs().max()) > 1e-3
    assert moved_plain, "the untouched network must not pass the same check"


def test_circular_padding_alone_is_exact_for_whole_strides_only(random_image_batch):
    changed = antialias.polyphase(strided_net(), adaptive=False)
    reference = changed(random_image_batch)
    torch.testing.assert_close(changed(random_image_batch.roll((16, 8), (-2, -1))), reference)
    moved = changed(random_image_batch.roll((3, 5), (-2, -1)))
    assert float((moved - reference).abs().max() / reference.abs().max()) > 1e-3


def test_polyphase_names_the_layer_that_does_not_divide(random_image_batch):
    changed = antialias.polyphase(strided_net())
    with pytest.raises(ValueError, match=r"'4'.*multiples of 2×2, got 15×15"):
        changed(random_image_batch[..., :60, :60])


def test_reestimated_batch_norm_has_the_batches_statistics(random_image_batch):
    encoder = strided_net()
    antialias.reestimate_batch_norm(encoder, random_image_batch.split(2))
    norm = encoder.net.get_submodule("1")
    values = taps.features(encoder, random_image_batch, ["0"])["0"]
    torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not norm.training
    assert norm.momentum == 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: antialias.blurpool(e, kernel="gauss"), "'gauss'.*rect2, tri3, bin5"),
        (lambda e: antialias.blurpool(e, layers=["1"]), "'1' does not subsample.*0, 3, 4"),
        (lambda e: antialias.reestimate_batch_norm(e, []), "no batch"),
    ],
)
def test_errors_name_the_choices(call, words):
    with pytest.raises(ValueError, match=words):
        call(strided_net())


def test_token_encoders_are_refused():
    with pytest.raises(ValueError, match="position embeddings"):
        antialias.polyphase(encoders.load("random:timm:vit_tiny_patch16_224"))


def colours(tmp_path, count=12):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    for i in range(count):
        pixels = (torch.rand(40, 48, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return images.load(f"folder:{folder}")


CONFIG = antialias.Distillation(
    layers=("2",), steps=12, batch_size=4, size=32, learning_rate=3e-3, save_every=4
)


def test_distillation_brings_a_disturbed_copy_back(tmp_path):
    teacher = strided_net()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.3)
    config = dataclasses.replace(CONFIG, steps=60, learning_rate=1e-2)
    history = antialias.distil(student, teacher, colours(tmp_path), config)
    assert history[-1] < 0.1 * history[0]
    assert not any(p.requires_grad for p in student.parameters())


def test_a_resumed_distillation_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    teacher, pictures = strided_net(), colours(tmp_path)
    whole = antialias.blurpool(teacher)
    expected = antialias.distil(whole, teacher, pictures, CONFIG)

    path = tmp_path / "checkpoint.safetensors"
    stopped = antialias.blurpool(teacher)
    crops = antialias._crops

    def interrupted(images, config, step):
        if step == 9:
            raise KeyboardInterrupt
        return crops(images, config, step)

    monkeypatch.setattr(antialias, "_crops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        antialias.distil(stopped, teacher, pictures, CONFIG, checkpoint=path)
    monkeypatch.undo()
    again = antialias.blurpool(teacher)
    history = antialias.distil(again, teacher, pictures, CONFIG, checkpoint=path)
    assert history == expected
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(store.MismatchError, match="seed"):
        antialias.distil(again, teacher, pictures, other, checkpoint=path)


def test_a_diverging_distillation_stops_with_its_step(tmp_path):
    teacher = strided_net()
    student = antialias.blurpool(teacher)
    config = dataclasses.replace(CONFIG, learning_rate=1e30)
    with pytest.raises(antialias.DivergedError, match="step 1"):
        antialias.distil(student, teacher, colours(tmp_path), config)


def test_frozen_modules_keep_the_teachers_weights(tmp_path):
    teacher, pictures = strided_net(), colours(tmp_path)
    student = antialias.blurpool(teacher)
    antialias.distil(student, teacher, pictures, dataclasses.replace(CONFIG, frozen=("8", "1")))
    for name in ("8.weight", "8.bias", "1.weight"):
        assert torch.equal(student.net.get_parameter(name), teacher.net.get_parameter(name))
    assert not torch.equal(
        student.net.get_parameter("4.layer.weight"), teacher.net.get_parameter("4.weight")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frozen": ("9",)}, "no module '9' to freeze"),
        ({"frozen": ("",)}, "everything in .* is frozen"),
        ({"layers": ("9",)}, "'9'"),
    ],
)
def test_distillation_names_what_is_not_there(tmp_path, change, words):
    teacher = strided_net()
    with pytest.raises(ValueError, match=words):
        antialias.distil(
            antialias.blurpool(teacher),
            teacher,
            colours(tmp_path, 2),
            dataclasses.replace(CONFIG, **change),
        )


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2), nn.MaxPool2d((3, 2), 2, dilation=(2, 1))])
def test_pooling_by_rows_and_columns_is_pooling(pool):
    x = torch.randn(2, 4, 17, 20)
    part = antialias.Subsampler(pool, "pool")
    with torch.no_grad():
        fast = part.dense(x)
    assert torch.equal(fast, part.dense(x.requires_grad_()))
    torch.testing.assert_close(fast[..., ::2, ::2], pool(x))


@pytest.mark.parametrize("surgery", [antialias.blurpool, antialias.polyphase])
def test_changed_encoders_can_be_optimised_cast_and_read(surgery, random_image_batch):
    changed = surgery(strided_net())
    expected = changed(random_image_batch)
    fast = extract.optimise(changed, keep=["4"])
    torch.testing.assert_close(fast(random_image_batch), expected, rtol=1e-4, atol=1e-5)
    wide = copy.deepcopy(changed).double()
    torch.testing.assert_close(wide(random_image_batch.double()).float(), expected)
    # a kernel of three at stride two, blurred by three: five pixels
    fields = taps.receptive_fields(antialias.blurpool(strided_net()), ["0", "3"])
    assert fields["0"] == (5, 2)
    assert fields["3"][0] == 5 + 4 * 2


def test_polyphase_takes_the_nearest_size_that_divides():
    odd = strided_net()
    odd.input_size = 61
    assert antialias.polyphase(odd).input_size == 56


# ------------------------------------------------------------------------------------------- twins


def trained(teacher: Encoder) -> Encoder:
    student = antialias.blurpool(teacher)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in ("0.layer.weight", "4.layer.weight"):
            parameter = student.net.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        student.net.get_submodule("1").running_mean.add_(1e-5)  # pyright: ignore
    return student


def test_a_twin_comes_back_as_it_was_saved(tmp_path, random_image_batch):
    teacher = strided_net()
    student = trained(teacher)
    path = tmp_path / "twin.safetensors"
    card = {"steps": 3, "images": ["photos"]}
    antialias.save_twin(path, student, teacher, kernel="tri3", card=card)
    kept, _ = store.load_tensors(path)
    # what is as it was needs no place; weights are halves, statistics are not
    assert {name: value.dtype for name, value in kept.items()} == {
        "0.layer.weight": torch.float16,
        "4.layer.weight": torch.float16,
        "1.running_mean": torch.float32,
    }
    again, found = antialias.load_twin(path, teacher)
    assert found == card
    assert again.name == "twin-tri3:strided"
    assert again.weight_hash not in (teacher.weight_hash, student.weight_hash)
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(
        again(random_image_batch), student(random_image_batch), rtol=1e-2, atol=1e-3
    )
    assert torch.equal(
        again.net.get_submodule("1").running_mean,  # pyright: ignore
        student.net.get_submodule("1").running_mean,  # pyright: ignore
    )
    assert store.NOTES["encoder"][again.name] == again.weight_hash


def test_a_twin_is_refused_by_another_encoder_or_kernel(tmp_path):
    teacher = strided_net()
    path = tmp_path / "twin.safetensors"
    antialias.save_twin(path, trained(teacher), teacher, kernel="tri3", card={})
    other = strided_net()
    other.name = "another"
    with pytest.raises(store.MismatchError, match="'original' expected 'another', found 'strided'"):
        antialias.load_twin(path, other)
    changed = strided_net()
    changed.weight_hash = "0" * 64
    with pytest.raises(store.MismatchError, match="original_weights"):
        antialias.load_twin(path, changed)
    with pytest.raises(store.MismatchError, match="'kernel' expected 'bin5', found 'tri3'"):
        antialias.load_twin(path, teacher, kernel="bin5")
    with pytest.raises(FileNotFoundError, match="no tensor file"):
        antialias.load_twin(tmp_path / "none.safetensors", teacher)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a complete tensor file"):
        antialias.load_twin(path, teacher)


def test_what_is_no_twin_is_not_saved(tmp_path):
    teacher, path = strided_net(), tmp_path / "twin.safetensors"
    with pytest.raises(ValueError, match="nothing to save"):
        antialias.save_twin(path, antialias.blurpool(teacher), teacher, kernel="tri3", card={})
    with pytest.raises(ValueError, match="its layers differ"):
        antialias.save_twin(path, teacher, teacher, kernel="tri3", card={})
    huge = trained(teacher)
    with torch.no_grad():
        huge.net.get_parameter("0.layer.weight").mul_(1e9)
    with pytest.raises(ValueError, match=r"'0.layer.weight'.*not finite in half"):
        antialias.save_twin(path, huge, teacher, kernel="tri3", card={})
    assert not path.exists()


def test_fidelity_counts_agreement_and_right_answers(random_image_batch):
    teacher = strided_net()
    student = trained(teacher)
    found = antialias.fidelity(student, teacher, random_image_batch.split(3))
    tops = [e(random_image_batch).argmax(1) for e in (student, teacher)]
    assert found.same.tolist() == (tops[0] == tops[1]).double().tolist()
    assert found.original is None
    labels = [int(tops[1][0]), -1, -1, -1]
    found = antialias.fidelity(student, teacher, [random_image_batch], labels=labels)
    assert found.original is not None
    assert found.original.tolist() == [1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 4 images"):
        antialias.fidelity(student, teacher, [random_image_batch], labels=[1, 2])
    with pytest.raises(ValueError, match="no images"):
        antialias.fidelity(student, teacher, [])


def test_an_encoder_without_a_twin_is_told_so():
    with pytest.raises(ValueError, match="no trained twin of 'resnet18'"):
        antialias.twin("resnet18")


@pytest.mark.parametrize("name", antialias.twins())
def test_the_shipped_twin_is_whole_and_calmer(name, monkeypatch, tmp_path):
    twin = antialias.twin(name)
    original = encoders.load(name)
    assert twin.name == f"twin-tri3:{name}"
    assert sorted(antialias.strided(twin)) == sorted(
        f"{layer}.layer" for layer in antialias.strided(original)
    )
    assert all(
        isinstance(twin.net.get_submodule(layer), antialias.BlurPool)
        for layer in antialias.strided(original)
    )
    pictures = images.load("photos").split(antialias.TRAIN_FRACTION, seed=antialias.TRAIN_SEED)[1]
    batches = list(pictures.select(range(24)).batches(160, 8))
    surgery = antialias.blurpool(original)
    kept = [antialias.fidelity(e, original, batches).same.mean() for e in (twin, surgery)]
    assert kept[0] > kept[1]

    card = store.read_json(antialias.twin_path(name).with_suffix(".json"))
    assert card["images_hash"]
    assert card["settings"]["steps"] > 0
    monkeypatch.setitem(antialias._TWINS, name, ("tri3", "0" * 64))
    with pytest.raises(ValueError, match="not the file this project was checked with"):
        antialias.twin(name)
    monkeypatch.setenv("FMLIB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="fetch the data folder"):
        antialias.twin(name)


def test_shipped_weights_are_listed_and_small():
    folder = images.data_root() / "weights"
    listed = {antialias.twin_path(name) for name in antialias.twins()}
    files = {path for path in folder.iterdir() if path.is_file()}  # decoders lie in a folder
    assert {path for path in files if path.suffix != ".json"} == listed
    assert {path.with_suffix(".json") for path in listed} == set(folder.glob("*.json"))
    assert sum(path.stat().st_size for path in files) <= 10_000_000
