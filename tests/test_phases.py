"""The short cut gives the features of the plain forward pass, and only where it may be taken."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from fmlib import encoders, phases, shift, taps
from fmlib.encoders import Encoder


@pytest.fixture(autouse=True)
def _small_networks_are_worth_it(monkeypatch):
    """Windows of networks of three layers cost more than they save; here they are made anyway."""
    monkeypatch.setattr(phases, "_WINDOW_COST", 0.0)


@pytest.fixture(scope="module")
def cutout() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    obj = torch.rand(4, 40, 40, generator=generator)
    obj[3] = (obj[3] > 0.3).float()
    return obj


def convolutions(*, padding: bool = True) -> Encoder:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=int(padding)),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 5, stride=1, padding=2 * int(padding)),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=int(padding)),
        nn.Conv2d(8, 4, 3, padding=int(padding)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Encoder(net, name="convolutions", input_size=96)


def both_ways(encoder, layers, obj, positions, canvas):
    ground = shift.paint("white", canvas)
    stages = phases.plan(encoder, layers, positions, size=tuple(obj.shape[1:]), canvas=canvas)
    sweep = phases.Chain(encoder, layers, stages, empty=ground[None]).sweep(
        lambda p: shift.compose(obj, p, canvas=canvas, background="white"), batch_size=8
    )
    parts = [sweep(part) for part in positions.split(8)]
    short = {name: torch.cat([part[name] for part in parts]) for name in layers}
    pictures = shift.compose(obj, positions, canvas=canvas, background="white")
    return stages, short, taps.features(encoder, pictures, layers, batch_size=32)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_equals_the_plain_pass_on_every_unit(cutout, padding, stride):
    encoder = convolutions(padding=padding)
    positions = shift.grid(96, 40, stride).positions
    positions = positions[torch.randperm(len(positions))[:400]]
    layers = ["5", "7"]
    stages, short, plain = both_ways(encoder, layers, cutout, positions, 96)
    assert stages, "a chain of strided convolutions must be shared"
    for name in layers:
        torch.testing.assert_close(short[name], plain[name], rtol=1e-5, atol=1e-6)


def test_oblong_objects_and_canvas_corners(cutout):
    encoder = convolutions()
    corners = torch.tensor([[0, 0], [0, 80], [66, 0], [66, 80], [33, 40], [34, 41], [35, 44]])
    _, short, plain = both_ways(encoder, ["5"], cutout[:, :30, :16], corners, 96)
    torch.testing.assert_close(short["5"], plain["5"], rtol=1e-5, atol=1e-6)


def test_windows_that_were_dropped_are_made_again(cutout, monkeypatch):
    monkeypatch.setattr(phases, "_CACHE_BYTES", 1)
    encoder = convolutions()
    positions = shift.grid(96, 40, 8).positions
    _, short, plain = both_ways(encoder, ["5"], cutout, positions, 96)
    torch.testing.assert_close(short["5"], plain["5"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("canvas", [151, 152, 154])
def test_strips_at_the_border_on_every_position(ceil, canvas, monkeypatch):
    """A deep stage, all of whose border positions are put together of strips."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=ceil),
        Conv2dSame(6, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.BatchNorm2d(4).eval(),
        nn.Conv2d(4, 4, 3),
    )
    encoder = Encoder(net, name="strips", input_size=96)
    generator = torch.Generator().manual_seed(1)
    obj = torch.rand(4, 30, 24, generator=generator)
    positions = torch.cartesian_prod(torch.arange(canvas - 29), torch.arange(canvas - 23))
    picture = torch.rand(1, 3, canvas, canvas)
    stages, units = [], {}
    for name in ("2", "6"):
        spans = taps.spans(encoder, [name], size=canvas)[name]
        assert spans is not None
        units[name] = taps.features(encoder, picture, name)[name].shape[2]
        rows, columns = (
            phases.Axis(*span, units=units[name], canvas=canvas, size=side)
            for span, side in zip(spans, (30, 24), strict=True)
        )
        tables = tuple(rows.canonical()), tuple(columns.canonical())
        stages.append(phases.Stage(name, rows, columns, *tables))
    monkeypatch.setattr(phases, "_STRIPS", 2.0)  # even where they save nothing
    runs = []
    plain_segment = phases.Sweep._segment
    monkeypatch.setattr(
        phases.Sweep,
        "_segment",
        lambda self, depth, maps: (
            runs.append((depth, *maps.shape)),
            plain_segment(self, depth, maps),
        )[1],
    )
    ground = shift.paint("white", canvas)
    sweep = phases.Chain(encoder, ["7"], stages, empty=ground[None]).sweep(
        lambda p: shift.compose(obj, p, canvas=canvas), batch_size=64
    )
    edge = (positions.amin(1) < 20) | ((positions - positions.amax(0)).amax(1) > -20)
    positions = torch.cat([positions[edge][::17], positions[~edge][::97], positions[-3:]])
    for part in positions.split(128):
        pictures = shift.compose(obj, part, canvas=canvas)
        torch.testing.assert_close(
            sweep(part)["7"], taps.features(encoder, pictures, "7")["7"], rtol=1e-4, atol=1e-5
        )
    assert any(depth == 2 and height < units["2"] for depth, _, _, height, _ in runs)


def test_positions_of_one_phase_share_a_window():
    axis = phases.Axis(low=-3, high=5, stride=4, units=24, canvas=96, size=40)
    table = axis.canonical()
    inside = [x for x in range(57) if axis.interior(x)]
    assert len({table[x] for x in inside}) == 4
    assert all(table[x] % 4 == x % 4 and axis.interior(table[x]) for x in inside)
    assert all(table[x] == x for x in range(57) if x not in inside)
    assert not axis.interior(0)
    assert not axis.interior(56)


def test_nothing_is_shared_where_every_unit_sees_everything():
    encoder = encoders.load("random:timm:vit_tiny_patch16_224")
    positions = shift.grid(224, 125, 33).positions
    deepest = encoder.recommended[-1]
    stages = phases.plan(encoder, [deepest], positions, size=(125, 125), canvas=224)
    # The patch embedding sees one patch a unit, so at most that may be shared.
    assert all(stage.layer.startswith("patch_embed") for stage in stages)


class Roll(nn.Module):
    def forward(self, x):
        return torch.roll(x, 3, -1)


class Functional(nn.Module):
    """Pads in its forward, where no module shows it."""

    def __init__(self, mode, value=0.0):
        super().__init__()
        self.mode, self.value = mode, value

    def forward(self, x):
        return F.pad(x, (2, 2, 2, 2), self.mode, self.value)


class Place(nn.Module):
    """Adds to each unit a number of its own, as a position embedding does."""

    def forward(self, x):
        ramp = torch.linspace(0, 1, x.shape[-1])
        return x + ramp * ramp[:, None]


class Strongest(nn.Module):
    """Keeps the polyphase component of most energy: no gradient shows what that depends on."""

    def forward(self, x):
        parts = torch.stack([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)
        best = parts.square().sum((2, 3, 4)).argmax(1)
        return parts[torch.arange(len(x)), best]


def padded(pad, *, margin=2):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        pad,
        nn.Conv2d(6, 8, 1 + 2 * margin),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
    )
    return Encoder(net, name="padded", input_size=96)


@pytest.mark.parametrize(
    ("pad", "words"),
    [
        (nn.ReflectionPad2d(2), "'2' is a ReflectionPad2d"),
        (nn.ReplicationPad2d(2), "'2' is a ReplicationPad2d"),
        (nn.CircularPad2d(2), "'2' is a CircularPad2d"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"), "'2' pads by circular"),
        (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), "'2' pads by reflect"),
        (Functional("circular"), "padding by circular"),
        (Functional("reflect"), "padding by reflect"),
        (Functional("replicate"), "padding by replicate"),
        (Roll(), "roll"),
        (Place(), None),
        (Strongest(), None),
    ],
)
def test_nothing_is_shared_where_it_would_not_be_exact(pad, words, monkeypatch):
    encoder = padded(pad)
    positions = shift.grid(96, 40, 1).positions
    found = phases.obstacle(encoder, canvas=96)
    assert found is None if words is None else words in str(found)
    arguments = (encoder, ["5"], positions)
    options = {"size": (40, 40), "canvas": 96}
    assert phases.plan(*arguments, **options) == []
    # it is not that there was nothing to share
    monkeypatch.setattr(phases, "obstacle", lambda *a, **o: None)
    monkeypatch.setattr(phases, "_holds", lambda *a: True)
    assert phases.plan(*arguments, **options)


@pytest.mark.parametrize("mode", ["circular", "reflect", "none"])
def test_the_comparison_alone_would_find_most(mode, cutout):
    """The second lock: with the list of obstacles gone, a wrong chain is still refused."""
    pad = {"circular": nn.CircularPad2d(2), "reflect": nn.ReflectionPad2d((12, 0, 12, 0))}.get(mode)
    encoder = padded(pad or nn.ZeroPad2d(2))
    positions = shift.grid(96, 40, 1).positions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "obstacle", lambda *a, **o: None)
        found = phases.plan(encoder, ["5"], positions, size=(40, 40), canvas=96)
    assert bool(found) == (mode == "none")


@pytest.mark.parametrize(
    "pad", [nn.ConstantPad2d(2, 0.7), nn.ZeroPad2d(2), Functional("constant", -3.0)]
)
def test_padding_by_any_constant_is_exact(pad, cutout):
    encoder = padded(pad)
    assert phases.obstacle(encoder, canvas=96) is None
    positions = shift.grid(96, 40, 1).positions
    generator = torch.Generator().manual_seed(0)
    edge = (positions.amin(1) < 12) | (positions.amax(1) > 44)
    positions = positions[torch.randperm(len(positions), generator=generator)]
    positions = torch.cat([positions[:200], shift.grid(96, 40, 1).positions[edge][::9]])
    stages, short, plain = both_ways(encoder, ["5"], cutout, positions, 96)
    assert stages
    torch.testing.assert_close(short["5"], plain["5"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1"])
def test_packaged_encoders_to_five_decimals_of_cosine(name, cutout):
    encoder = encoders.load(name)
    obj = shift.prepare(cutout, 75)
    positions = shift.grid(224, 75, 8).positions[::37]
    layers = [encoder.recommended[-2], encoder.recommended[-1]]
    stages, short, plain = both_ways(encoder, layers, obj, positions, 224)
    assert stages
    for name_ in layers:
        cosine = torch.cosine_similarity(short[name_].flatten(1), plain[name_].flatten(1))
        assert float((1 - cosine).max()) < 1e-5


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1"])
def test_packaged_encoders_on_the_exhaustive_grid(name, cutout):
    """The chain for all 100² positions: strips at every side, and windows of every phase."""
    encoder = encoders.load(name)
    layer = encoder.recommended[-1]
    obj = shift.prepare(cutout, 125)
    everywhere = shift.grid(224, 125, 1).positions
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(everywhere), generator=generator)[:16]
    sample = torch.cat([shift.references(224, 125), everywhere[some]])
    stages = phases.plan(encoder, [layer], everywhere, size=(125, 125), canvas=224)
    assert any(sum(edge.share for edge in stage.edges(None)) > 0 for stage in stages)
    chain = phases.Chain(encoder, [layer], stages, empty=shift.paint("white", 224)[None])
    found = {}
    for way in (None, chain):
        parts = shift.features(encoder, obj, sample, [layer], chain=way, pool="flatten")
        found[way] = torch.cat([vectors[layer] for _, vectors in parts])
    torch.testing.assert_close(found[chain], found[None], rtol=1e-3, atol=1e-4)
    cosine = torch.cosine_similarity(found[chain].double(), found[None].double())
    assert float((1 - cosine).max()) < 1e-5
