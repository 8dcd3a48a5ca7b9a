"""Codes by name, and what is done to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fmlib import codes, descriptors, encoders, taps

VECTOR = torch.tensor([[0.0, 3.0, 4.0, 0.0], [1.0, 0.0, 0.0, -2.0]])


def norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


class TestChanges:
    def test_binarise_keeps_signs_zeros_and_norm(self) -> None:
        found = codes.make("binarise")(VECTOR)
        assert torch.equal(found.sign(), VECTOR.sign())
        assert torch.allclose(found[0], torch.tensor([0, 1, 1, 0]) * 5 / 2**0.5)
        assert torch.allclose(norms(found), norms(VECTOR))

    @pytest.mark.parametrize("bits", [1, 2, 5])
    def test_quantise_uses_so_many_values_in_each_channel(self, bits: int) -> None:
        x = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        found = codes.make(f"quantise:{bits}")(x)
        for channel in range(3):
            assert len(found[:, channel].unique()) == 2**bits
        step = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))) / (2**bits - 1)
        assert bool(((found - x).abs() <= step[:, None, None] / 2 + 1e-5).all())

    def test_quantise_takes_extremes_from_the_population_and_clips(self) -> None:
        population = torch.tensor([[0.0], [1.0]])
        found = codes.make("quantise:1")(torch.tensor([[0.3], [0.8], [7.0]]), population=population)
        assert found.flatten().tolist() == [0, 1, 1]

    def test_quantise_leaves_a_constant_channel(self) -> None:
        assert codes.make("quantise:3")(torch.full((2, 1), 2.5)).tolist() == [[2.5], [2.5]]

    def test_dropout_drops_the_share_and_keeps_the_norm(self) -> None:
        x = torch.rand(4, 2000) + 0.1
        found = codes.make("dropout:0.3")(x, seed=1)
        share = (found == 0).float().mean()
        assert 0.25 < float(share) < 0.35
        assert torch.allclose(norms(found), norms(x))

    @pytest.mark.parametrize("text", ["dropout:0.5", "noise:1", "shuffle"])
    def test_random_changes_depend_on_seed_and_code_not_on_the_batch(self, text: str) -> None:
        x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
        change = codes.make(text)
        state = torch.get_rng_state()
        together = change(x, seed=3)
        assert torch.equal(together[2:], change(x[2:], seed=3))
        assert not torch.equal(together, change(x, seed=4))
        assert torch.equal(torch.get_rng_state(), state)

    def test_noise_has_the_wanted_norm(self) -> None:
        found = codes.make("noise:0.5")(VECTOR)
        assert torch.allclose(norms(found - VECTOR), norms(VECTOR) / 2)

    def test_dead_channels_are_the_same_in_all_images(self) -> None:
        x = torch.rand(5, 40, 2, 2) + 0.1
        dead = (codes.make("dead:0.25")(x, seed=2) == 0).all(2).all(2)
        assert bool((dead == dead[0]).all())
        assert int(dead[0].sum()) == 10

    def test_permute_moves_channels_alike(self) -> None:
        x = torch.rand(2, 30)
        found = codes.make("permute")(x)
        order = (found[0][:, None] == x[0]).float().argmax(1)
        assert torch.equal(found[1], x[1][order])
        assert sorted(order.tolist()) == list(range(30))
        assert order.tolist() != list(range(30))

    def test_shuffle_keeps_the_pattern_and_the_magnitudes(self) -> None:
        x = torch.randn(2, 3, 5, 5).relu()
        found = codes.make("shuffle")(x)
        assert torch.equal(found.sign(), x.sign())
        for before, after in zip(x.flatten(1), found.flatten(1), strict=True):
            assert torch.equal(before.sort().values, after.sort().values)
        assert not torch.equal(found, x)

    def test_probabilities(self) -> None:
        p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
        assert codes.make("top:2")(p).tolist() == [[0.5, pytest.approx(0.3), 0, 0]]
        assert torch.allclose(codes.make("rest:2")(p), torch.tensor([[0, 0, 0.15, 0.05]]))
        assert torch.allclose(codes.make("top:2")(p) + codes.make("rest:2")(p), p)
        assert torch.allclose(
            codes.make("round:1")(p), torch.tensor([[0.5, 0.3, 0.1, 0.1]]), atol=0.11
        )
        assert torch.allclose(codes.make("temperature:1")(p), p)
        assert torch.allclose(
            codes.make("temperature:0.5")(p), p.square() / p.square().sum(), atol=1e-6
        )
        assert torch.allclose(codes.make("softmax")(p.log()), p)

    @pytest.mark.parametrize("text", sorted(codes.CHANGES))
    def test_names_come_back_and_shapes_stay(self, text: str) -> None:
        change = codes.make(text)
        assert codes.make(change.name) == change
        x = torch.rand(3, 6)
        assert change(x).shape == x.shape

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("binarize", "did you mean 'binarise'"),
            ("binarise:2", "takes no value"),
            ("quantise:2.5", "whole number from 1 to 24"),
            ("dropout:1", "from 0 to"),
            ("round:x", "'x' is not a number"),
            ("top:", "not a number"),
        ],
    )
    def test_bad_names(self, text: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            codes.make(text)

    def test_probabilities_of_a_grid_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"top:5 is for vectors .* \(1, 3, 2, 2\)"):
            codes.make("top:5")(torch.rand(1, 3, 2, 2))

    def test_a_population_of_other_codes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="population"):
            codes.make("quantise:2")(torch.rand(2, 3), population=torch.rand(2, 4))


class TestCodes:
    def test_of_an_encoder(self, squeezenet: encoders.Encoder) -> None:
        x = torch.rand(2, 3, 64, 64)
        names = ["features.4", "logits", "probabilities", "features.4|binarise"]
        reader = codes.Codes(squeezenet, names)
        with torch.no_grad():
            found = reader(x)
            logits = squeezenet(x)
        assert list(found) == names
        assert torch.allclose(
            found["features.4"], taps.features(squeezenet, x, "features.4")["features.4"]
        )
        assert torch.allclose(found["logits"], logits, atol=1e-5)
        assert torch.allclose(found["probabilities"].sum(1), torch.ones(2))
        assert torch.allclose(norms(found["features.4|binarise"]), norms(found["features.4"]))
        assert reader.shapes(64)["logits"] == (1000,)
        assert reader.shapes((64, 96))["features.4"] == (128, 15, 23)

    @pytest.mark.parametrize("name", encoders.packaged())
    def test_logits_are_what_the_encoder_gives(
        self, name: str, encoder: Callable[[str], encoders.Encoder]
    ) -> None:
        x = torch.rand(1, 3, 98, 98)
        if name.startswith("vit"):
            with pytest.raises(ValueError, match="no classifier"):
                codes.Codes(encoder(name), "probabilities")
            return
        with torch.no_grad():
            found = codes.Codes(encoder(name), "logits")(x)["logits"]
            assert torch.allclose(found, encoder(name)(x), atol=1e-4)

    def test_gradients_reach_the_image(self, squeezenet: encoders.Encoder) -> None:
        x = torch.rand(1, 3, 64, 64, requires_grad=True)
        codes.Codes(squeezenet, "features.7")(x)["features.7"].square().sum().backward()
        assert x.grad is not None
        assert float(x.grad.abs().sum()) > 0

    def test_opened_and_closed_agree_and_leave_no_hooks(self, squeezenet: encoders.Encoder) -> None:
        reader = codes.Codes(squeezenet, ["features.4"])
        x = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            once = reader(x)["features.4"]
            with reader.opened():
                again = reader(x)["features.4"]
        assert torch.equal(once, again)
        assert not any(m._forward_hooks for m in squeezenet.modules())

    def test_of_descriptors_and_what_is_remembered(self) -> None:
        calls = 0

        class Counting(torch.nn.Module):
            differentiable = False

            def forward(self, x: Tensor) -> Tensor:
                nonlocal calls
                calls += len(x)
                return x.mean((2, 3), keepdim=True)

        x = torch.rand(3, 3, 16, 16)
        reader = codes.Codes({"mean": Counting(), "hog": descriptors.make("hog")}, ["mean"],
                             remember=True)  # fmt: skip
        first, second = reader(x)["mean"], reader(x.flip(0))["mean"]
        assert calls == 3
        assert torch.equal(first.flip(0), second)
        assert first.shape == (3, 3)

    def test_identity_tells_encoders_and_codes_apart(self, squeezenet: encoders.Encoder) -> None:
        reader = codes.Codes(squeezenet, ["features.4", "logits"])
        assert reader.identity("features.4") != reader.identity("logits")
        other = codes.Codes(encoders.load("random:squeezenet1_1"), ["logits"])
        assert reader.identity("logits")["weights"] != other.identity("logits")["weights"]

    def test_bad_names(self, squeezenet: encoders.Encoder) -> None:
        with pytest.raises(ValueError, match=r"features\.4"):
            codes.Codes(squeezenet, ["features.44"])
        with pytest.raises(ValueError, match="unknown change of a code 'binary'"):
            codes.Codes(squeezenet, ["features.4|binary"])
        with pytest.raises(ValueError, match=r"unknown descriptor 'hogs'.*hog"):
            codes.Codes({"hog": descriptors.make("hog")}, "hogs")
        with pytest.raises(ValueError, match="no codes"):
            codes.Codes(squeezenet, [])
