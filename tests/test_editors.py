"""Generative editing with a tiny random pipeline: what is written, kept, refused and resumed."""

import sys
import threading

import pytest
import torch

from fmlib import editors, edits, images, store

PROMPTS = {"blue": "make it blue", "lights_on": "turn the lights on"}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An InstructPix2Pix pipeline of random weights, saved as a hub's would be."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=8,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=24, bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1, pad_token_id=1,
        )
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(), safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def editor(folder):
    return editors.load(str(folder), num_inference_steps=2)


@pytest.fixture(scope="module")
def photos():
    return images.load("photos", limit=2)


class Counting:
    """An editor that inverts the picture, counts its calls, and fails at one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.fail_at = fail_at

    def __call__(self, *, image, prompt, generator, **settings):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(prompt)
        half = image.point(lambda level: 255 - level).resize((16, 16))
        return type("Output", (), {"images": [half]})


def counting(fail_at: int | None = None) -> tuple[editors.Loaded, Counting]:
    pipeline = Counting(fail_at)
    return editors.Loaded(pipeline, "counting", {"steps": 1}), pipeline


def read(path) -> torch.Tensor:
    return images.read(path)


def test_a_pipeline_edits_photographs_into_pairs(editor, photos, tmp_path):
    report = editors.edit(editor, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert report == editors.Report(made=4, kept=0, taken=())
    found = edits.edited_folder(str(tmp_path))
    assert set(found.edits) == set(PROMPTS)
    assert found.unmatched == ()
    before, after = found.before["blue"].batch(32), found.after["blue"].batch(32)
    assert (before - after).abs().mean() > 0.01
    assert (before - photos.batch(32)).abs().max() < 1 / 255
    assert torch.equal(before, found.before["lights_on"].batch(32))
    assert not torch.equal(after, found.after["lights_on"].batch(32))


def test_a_picture_is_the_same_alone_and_again(editor, photos, tmp_path):
    editors.edit(editor, photos, PROMPTS, tmp_path / "both", size=32, progress=False)
    alone = photos.select([1])
    one = {"lights_on": PROMPTS["lights_on"]}
    editors.edit(editor, alone, one, tmp_path / "one", size=32, progress=False)
    (name,) = (path.name for path in (tmp_path / "one").glob("*_lights_on.png"))
    assert torch.equal(read(tmp_path / "one" / name), read(tmp_path / "both" / name))
    again = {"blue": PROMPTS["blue"]}
    editors.edit(editor, alone, again, tmp_path / "seed", size=32, seed=1, progress=False)
    other = name.replace("lights_on", "blue")
    assert not torch.equal(read(tmp_path / "seed" / other), read(tmp_path / "both" / other))


def test_nothing_is_edited_twice_after_an_interrupt(photos, tmp_path):
    broken, first = counting(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        editors.edit(broken, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert len(first.calls) == 3
    assert not list(tmp_path.glob("*.claim"))
    whole, second = counting()
    report = editors.edit(whole, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert report == editors.Report(made=1, kept=3, taken=())
    assert len(second.calls) == 1
    assert editors.edit(whole, photos, PROMPTS, tmp_path, size=32, progress=False).kept == 4
    assert len(second.calls) == 1
    assert len(edits.edited_folder(str(tmp_path)).before["blue"]) == 2


def test_processes_share_a_folder(photos, tmp_path):
    loaded, pipeline = counting()

    def work() -> None:
        editors.edit(loaded, photos, PROMPTS, tmp_path, size=32, progress=False)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = editors.edit(loaded, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert report.kept + report.made == 4
    assert len(pipeline.calls) == 4


def test_what_another_has_in_work_is_told(photos, tmp_path):
    loaded, pipeline = counting()
    editors.edit(loaded, photos.select([0]), PROMPTS, tmp_path, size=32, progress=False)
    for path in tmp_path.glob("*_blue.png"):
        path.rename(path.with_name(path.name + ".claim"))
    report = editors.edit(loaded, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert [name.endswith("_blue.png") for name in report.taken] == [True]
    assert (report.made, report.kept, len(pipeline.calls)) == (2, 1, 4)


def test_an_answer_of_another_size_is_fitted(photos, tmp_path):
    loaded, _ = counting()
    editors.edit(loaded, photos, PROMPTS, tmp_path, size=32, progress=False)
    assert {read(path).shape for path in tmp_path.glob("*.png")} == {(3, 32, 32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 42, not 1"),
        ({"size": 48}, "size 32, not 48"),
        ({"prompts": {"blue": "make it bluer"}}, "'blue' by the prompt 'make it blue'"),
        ({"editor": editors.Loaded(Counting(), "another", {"steps": 1})}, "editor 'counting'"),
        ({"editor": editors.Loaded(Counting(), "counting", {"steps": 2})}, "settings"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes, message, photos, tmp_path):
    loaded, _ = counting()
    options = {"editor": loaded, "prompts": PROMPTS, "size": 32, "seed": 42}
    editors.edit(
        options["editor"], photos, options["prompts"], tmp_path, size=32, seed=42, progress=False
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options |= changes
    with pytest.raises(store.MismatchError, match=message):
        editors.edit(
            options["editor"], photos, options["prompts"], tmp_path, size=options["size"],
            seed=options["seed"], progress=False,
        )  # fmt: skip
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_new_edits_join_the_old(photos, tmp_path):
    loaded, _ = counting()
    editors.edit(loaded, photos, {"blue": "b"}, tmp_path, size=32, progress=False)
    editors.edit(loaded, photos, {"red": "r"}, tmp_path, size=32, progress=False)
    assert store.read_json(tmp_path / "editor.json")["prompts"] == {"blue": "b", "red": "r"}
    assert set(edits.edited_folder(str(tmp_path)).edits) == {"blue", "red"}


def test_prompts_are_read(tmp_path):
    path = tmp_path / "prompts.yml"
    path.write_text("blue: make the body bright blue\nlights-on: turn on the lamps\n")
    assert editors.prompts(path)["lights-on"] == "turn on the lamps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- blue", "found list"),
        ("", "found NoneType"),
        ("a b: x", "'a b' cannot name an edit"),
        ("resized: x", "'resized' cannot name"),
        ("blue: ''", "the prompt of 'blue' is empty"),
        ("blue: 3", "no text: 3"),
    ],
)
def test_bad_prompts_are_named(text, message, tmp_path):
    path = tmp_path / "prompts.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        editors.prompts(path)


def test_bad_calls(photos, tmp_path):
    loaded, pipeline = counting()
    with pytest.raises(ValueError, match="did you mean qwen-image-edit"):
        editors.load("qwen-image-edits")
    with pytest.raises(ValueError, match=r"model_index\.json is missing"):
        editors.load(str(tmp_path))
    with pytest.raises(ValueError, match="at least one picture"):
        editors.edit(loaded, photos.select([]), PROMPTS, tmp_path / "none")
    with pytest.raises(ValueError, match="cannot name an edit"):
        editors.edit(loaded, photos, {"a/b": "x"}, tmp_path / "none")
    with pytest.raises(ValueError, match="two pictures would both"):
        editors.edit(loaded, photos.select([0, 0]), PROMPTS, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert pipeline.calls == []


def test_without_diffusers_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install"):
        editors.load("instruct-pix2pix")


def test_published_settings_are_those_of_the_paper():
    qwen = editors.EDITORS["qwen-image-edit"]
    assert qwen.repository == "Qwen/Qwen-Image-Edit-2511"
    assert qwen.settings["num_inference_steps"] == 10
    assert (qwen.settings["guidance_scale"], qwen.settings["true_cfg_scale"]) == (1.0, 4.5)
