"""`nettrim prune FOLDER`: transformers' models in, folders that an ordinary transformers script loads out."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
from commands import nettrim
from networks import same_bits, state_of

import nettrim as package
from nettrim.sources.base import Reading
from nettrim.sources.huggingface import HuggingFace


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """bert, llama and vit, and text and images to calibrate on."""
    root = tmp_path_factory.mktemp("models")
    for make in (tiny_models.bert, tiny_models.llama, tiny_models.vit):
        make(root / make.__name__)
    (root / "text.txt").write_text(tiny_models.TEXT)
    (root / "bert" / "1_Pooling").mkdir()
    (root / "bert" / "1_Pooling" / "config.json").write_text('{"pooling": "mean"}')
    (root / "bert" / "pytorch_model.bin").write_bytes(b"the dense weights, in another form")
    tiny_models.images(root / "images")
    return root


@pytest.fixture(scope="module")
def pruned(made) -> Path:
    """llama, half of its weights zero."""
    out = made / "llama-pruned"
    result = nettrim("prune", made / "llama", "--calibration", made / "text.txt", "--sequence-length", 16, "--sparsity", 0.5, "--out", out)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return out


class TestDecoder:
    def test_an_ordinary_script_loads_it(self, made, pruned):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(pruned), AutoModelForCausalLM.from_pretrained(pruned)
        ids = tokenizer("call me", return_tensors="pt")["input_ids"]
        assert model.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
        assert model.dtype == torch.bfloat16
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_zeros_are_exact_and_the_rest_is_kept(self, made, pruned):
        from transformers import AutoModelForCausalLM

        model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pruned, made / "llama"))
        result = package.load(pruned, model)
        entries = zeros = 0
        for name, mask in result.masks.items():
            weight = model.get_parameter(name)
            assert torch.equal(weight != 0, mask)
            entries, zeros = entries + mask.numel(), zeros + int((~mask).sum())
        assert zeros == entries // 2 and result.report.certificate.holds
        assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)
        assert "lm_head" in result.report.skipped

    def test_the_folder_is_whole(self, made, pruned):
        names = {path.name for path in (made / "llama").iterdir()}
        assert {path.name for path in pruned.iterdir()} == names | {"masks.safetensors", "report.json", "report.html", "recipe.yaml"}
        assert (pruned / "tokenizer.json").read_bytes() == (made / "llama" / "tokenizer.json").read_bytes()

    def test_the_recipe_repeats_it(self, made, pruned):
        again = made / "llama-again"
        result = nettrim("prune", "--recipe", pruned / "recipe.yaml", "--out", again, "--quiet")
        assert result.exit_code == 0, result.output
        assert (again / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()

    def test_saved_from_python_too(self, made, tmp_path):
        source = HuggingFace(made / "llama")
        ids = torch.randint(3, 20, (8, 6), generator=torch.Generator().manual_seed(0))
        result = package.prune(source.model, {"input_ids": ids}, sparsity=0.5, forward_fn=source.forward_fn)
        package.save(result, tmp_path / "out")
        assert same_bits(state_of(HuggingFace(tmp_path / "out").model), state_of(result.model))


class TestEncoder:
    def test_text_for_it(self, made, tmp_path):
        from transformers import AutoModel

        out = tmp_path / "out"
        options = ("--epsilon", 0.2, "--mode", "parallel", "--samples", 7, "--batch-size", 3, "--out", out, "--quiet")
        result = nettrim("prune", made / "bert", "--calibration", made / "text.txt", *options)
        assert result.exit_code == 0, result.output
        report = package.Report.from_json(out / "report.json")
        assert report.layers[0].rows == 6 * 24  # whole samples of as many tokens as there are positions, less the one kept out
        model = AutoModel.from_pretrained(out)
        assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in package.load(out, model).masks.items())
        assert (out / "1_Pooling" / "config.json").read_text() == '{"pooling": "mean"}'
        assert not (out / "pytorch_model.bin").exists()  # it would be the dense ones

    def test_batches_are_whole_samples_with_special_tokens(self, made):
        source = HuggingFace(made / "bert")
        batches = source.from_texts([tiny_models.TEXT, tiny_models.TEXT], source.completed(Reading(samples=5, batch_size=2, sequence_length=10)))
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 10), (2, 10), (1, 10)]
        for batch in batches:
            assert batch["attention_mask"].all()
            assert (batch["input_ids"][:, 0] == 1).all() and (batch["input_ids"][:, -1] == 2).all()

    def test_arrays_of_tokens(self, made, tmp_path):
        ids = np.random.default_rng(0).integers(3, 20, (10, 6)).astype(np.int32)
        np.save(tmp_path / "ids.npy", ids)
        np.savez(tmp_path / "both.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=ids)
        found = []
        for name in ("ids.npy", "both.npz"):
            out = tmp_path / f"{name}-out"
            result = nettrim("prune", made / "bert", "--calibration", tmp_path / name, "--sparsity", 0.2, "--out", out, "--quiet")
            assert result.exit_code == 0, result.output
            found.append(safetensors.torch.load_file(out / "model.safetensors"))
        assert same_bits(*found)


class TestImages:
    def test_images_for_it(self, made, tmp_path):
        result = nettrim("prune", made / "vit", "--calibration", made / "images", "--epsilon", 0.2, "--out", tmp_path / "out", "--json")
        assert result.exit_code == 0, result.output
        rows = {layer["rows"] for layer in json.loads(result.stdout)["report"]["layers"]}
        assert rows == {11 * 4, 11 * 5, 11}  # four patches of 11 images; with the class token; the pooler sees the token alone

    def test_pixels_are_as_the_folder_says(self, made, tmp_path):
        from nettrim import samples

        source = HuggingFace(made / "vit")
        plain = samples.read(source, made / "images", Reading(samples=3, batch_size=2))
        assert [tuple(batch["pixel_values"].shape) for batch in plain] == [(2, 3, 16, 16), (1, 3, 16, 16)]
        assert 0 <= float(plain[0]["pixel_values"].min()) and float(plain[0]["pixel_values"].max()) <= 1
        source.place = tmp_path
        says = {"size": {"height": 16, "width": 8}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.5]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        scaled = samples.read(source, made / "images", Reading(image_size=(16, 16), samples=2, batch_size=2))[0]["pixel_values"]
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.5]).view(3, 1, 1)
        assert torch.equal(scaled, (plain[0]["pixel_values"] - mean) / std)
        assert source.completed(Reading()).image_size == (16, 8)

    @pytest.mark.parametrize(
        ("says", "size"),
        [({"do_center_crop": True, "crop_size": {"height": 16, "width": 8}, "size": {"height": 24, "width": 24}}, (16, 8)),
         ({"crop_size": 16, "size": {"shortest_edge": 24}}, (16, 16)),
         ({"do_center_crop": False, "crop_size": 8, "size": 16}, (16, 16)),
         ({"do_center_crop": True, "size": 16}, (16, 16)),
         ({}, (16, 16))],
    )  # fmt: skip
    def test_what_is_left_of_a_center_crop_is_the_size(self, made, tmp_path, says, size):
        source = HuggingFace(made / "vit")
        source.place = tmp_path
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
        assert source.completed(Reading()).image_size == size

    def test_pixels_that_the_processor_does_not_normalise_are_not(self, made, tmp_path):
        source = HuggingFace(made / "vit")
        source.place = tmp_path
        means = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        for says, expected in ((means, (0.5,) * 3), ({**means, "do_normalize": True}, (0.5,) * 3), ({**means, "do_normalize": False}, None)):
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
            found = source.completed(Reading())
            assert (found.image_mean, found.image_std) == (expected, expected and (0.25,) * 3)


class TestRefusals:
    def refused(self, tmp_path, *arguments) -> str:
        result = nettrim("prune", *arguments, "--epsilon", 0.1, "--out", tmp_path / "out")
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1 and "Traceback" not in result.output, result.output
        assert not (tmp_path / "out").exists()
        return result.stderr

    def test_folders(self, made, tmp_path):
        text = ("--calibration", made / "text.txt")
        assert "has no config.json; expected a Hugging Face folder" in self.refused(tmp_path, tmp_path, *text)
        config = tmp_path / "config.json"
        for content, message in (
            ("{", "cannot be read"),
            ("[]", "holds a list; expected an object"),
            ("{}", "names no architectures"),
            ('{"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}', "has no model 'Mine'; code in the folder is not run"),
            ('{"architectures": ["AutoTokenizer"]}', "has no model 'AutoTokenizer'"),
            ('{"architectures": ["BertModel"], "model_type": "bert"}', "cannot be read by transformers"),
        ):
            config.write_text(content)
            assert message in self.refused(tmp_path, tmp_path, *text), content
        assert "which holds its own; leave it out" in self.refused(tmp_path, made / "bert", *text, "--weights", made / "text.txt")

    def test_text(self, made, tmp_path):
        (tmp_path / "short.txt").write_text("call me")
        message = self.refused(tmp_path, made / "bert", "--calibration", tmp_path / "short.txt")
        assert "the text has 4 tokens; expected at least one sample of 24: lower --sequence-length" in message
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        assert "is no UTF-8 text" in self.refused(tmp_path, made / "bert", "--calibration", tmp_path / "latin.txt")
        assert "has no tokenizer" in self.refused(tmp_path, made / "vit", "--calibration", made / "text.txt")
        assert "text needs a tokenizer" in self.refused(tmp_path, "commands:MADE", "--calibration", made / "text.txt")

    def test_images(self, made, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.png").write_bytes(b"no image")
        assert "a.png cannot be read as an image" in self.refused(tmp_path, made / "vit", "--calibration", tmp_path / "images")
        assert "say it with --image-size" in self.refused(tmp_path, "commands:MADE", "--calibration", made / "images")
        (tmp_path / "images" / "b.txt").touch()
        assert "holds both images and text" in self.refused(tmp_path, made / "vit", "--calibration", tmp_path / "images")

    def test_arrays(self, made, tmp_path):
        np.savez(tmp_path / "odd.npz", words=np.ones((4, 3)), more=np.ones((4, 3)))
        assert "BertModel takes no 'words'" in self.refused(tmp_path, made / "bert", "--calibration", tmp_path / "odd.npz")
        assert "has no array 'x'; expected one of 'words', 'more'" in self.refused(
            tmp_path, made / "bert", "--calibration", tmp_path / "odd.npz", "--key", "x"
        )
        np.savez(tmp_path / "labels.npz", y_train=np.ones(4))
        assert "look like labels" in self.refused(tmp_path, made / "bert", "--calibration", tmp_path / "labels.npz")
        assert "is no calibration data" in self.refused(tmp_path, made / "bert", "--calibration", made / "bert" / "config.json")
