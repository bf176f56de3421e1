"""Blocks one behind the other: the same weights as where the whole network is run for every layer, and what is no such network is found out."""

from typing import Any

import pytest
import torch
from networks import same_bits, samples, state_of
from torch import Tensor, nn

from nettrim import ArgumentError, NetTrimError, PruneResult, prune, stages, verify
from nettrim.solvers import support

TOKENS = torch.randint(0, 23, (10, 6), generator=torch.Generator().manual_seed(0))
ASKED: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "fidelity": "layer"}


class Mixer(nn.Module):
    """Attention and a perceptron, both added to the hidden state; two of its layers in each are given the same input."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm, self.query, self.key, self.out = nn.LayerNorm(width), *(nn.Linear(width, width, bias=bias) for bias in (False, False, True))
        self.gate, self.up, self.down = nn.Linear(width, 20), nn.Linear(width, 20), nn.Linear(20, width)

    def mixed(self, hidden: Tensor, window: Tensor, turn: Tensor) -> Tensor:
        x = self.norm(hidden) + turn
        share = (self.query(x) @ self.key(x).transpose(1, 2) + window).softmax(-1)
        hidden = hidden + self.out(share @ x)
        return hidden + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))

    def forward(self, hidden: Tensor, *, odd_name: tuple[Tensor, dict[str, Tensor]], flag: bool = False) -> tuple[Tensor, bool]:
        return self.mixed(hidden, odd_name[0], odd_name[1]["turn"]), flag


class Decoder(nn.Module):
    """Blocks with keyword arguments, a tuple and a dictionary in them, that return tuples; layers before and behind them."""

    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embed, self.enter = nn.Embedding(23, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Mixer(width) for _ in range(depth))
        self.head = nn.Linear(width, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.enter(self.embed(tokens))
        window = torch.full((tokens.shape[1],) * 2, -9.0).triu(1).to(hidden)
        turn = torch.linspace(0, 1, hidden.shape[2]).to(hidden)
        for block in self.blocks:
            hidden, _ = block(hidden, odd_name=(window, {"turn": turn}), flag=True)
        return self.head(hidden)


def decoder(depth: int = 3, kind: type[Decoder] = Decoder) -> Decoder:
    torch.manual_seed(1)
    return kind(depth)


def both(model: nn.Module, data: Any, **asked: Any) -> tuple[PruneResult, PruneResult]:
    return prune(model, data, blocks=None, **asked), prune(model, data, **asked)


def assert_same(whole: PruneResult, blocks: PruneResult) -> None:
    assert str(whole.report.options["blocks"]).startswith("none")
    assert same_bits(state_of(whole.model), state_of(blocks.model))
    assert [layer.name for layer in whole.report.layers] == [layer.name for layer in blocks.report.layers]
    for ours, theirs in zip(whole.report.layers, blocks.report.layers, strict=True):
        norm = ours.discrepancy / max(ours.relative_discrepancy, 1e-9)  # batches of other sizes round otherwise
        assert theirs.discrepancy == pytest.approx(ours.discrepancy, rel=1e-6, abs=1e-6 * norm)
        assert theirs.epsilon == pytest.approx(ours.epsilon, rel=1e-5, abs=1e-6 * norm)
        assert theirs.accumulated == pytest.approx(ours.accumulated, rel=1e-6, abs=1e-6)
        assert theirs.holdout == pytest.approx(ours.holdout, rel=1e-6)
    for name in ("measured", "relative_measured", "holdout"):
        assert getattr(blocks.report.certificate, name) == pytest.approx(getattr(whole.report.certificate, name), rel=1e-5)
    assert whole.report.certificate.holds
    assert blocks.report.certificate.holds


@pytest.mark.parametrize(
    "asked",
    [ASKED, {**ASKED, "repair": 0.5}, {"pattern": "2:4", "fidelity": "layer"}, {**ASKED, "mode": "parallel"}, {"epsilon": 0.3}, {"sparsity": 0.6},
     {**ASKED, "fidelity": "diagonal"}],
    ids=["sparsity", "repair", "2:4", "parallel", "epsilon", "network", "diagonal"],
)
def test_the_weights_and_figures_are_those_of_the_whole_network(asked: dict[str, Any]) -> None:
    data = list(TOKENS.split(4))
    whole, blocks = both(decoder(), data, **asked)
    assert blocks.report.options["blocks"] == "blocks: 3 blocks"
    assert_same(whole, blocks)
    assert verify(decoder(), blocks.model, data, blocks.report, bounds=False).holds


@pytest.mark.parametrize("asked", [ASKED, {"epsilon": 0.3}], ids=["sparsity", "epsilon"])
def test_bfloat16_is_solved_in_float32_and_certified_as_stored(asked: dict[str, Any]) -> None:
    model = decoder().to(torch.bfloat16)
    whole, blocks = both(model, list(TOKENS.split(4)), **asked)
    assert_same(whole, blocks)
    assert all(p.dtype == torch.bfloat16 for p in blocks.model.parameters())
    assert verify(model, blocks.model, list(TOKENS.split(4)), blocks.report, bounds=False).holds


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 23}
SIZES["max_position_embeddings"] = 16
NARROW = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 23}
KINDS = {
    "LlamaForCausalLM": ("LlamaConfig", NARROW, "model.layers"),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**NARROW, "sliding_window": 3}, "model.layers"),  # masks that differ from block to block
    "GPT2LMHeadModel": ("GPT2Config", GPT2, "transformer.h"),  # weights the other way round
    "BertModel": ("BertConfig", SIZES, "encoder.layer"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_transformers_with_padding_and_a_cache(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, sizes, where = KINDS[kind]
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    mask = torch.ones_like(TOKENS)
    mask[2:5, :3] = 0
    data = [{"input_ids": ids, "attention_mask": own} for ids, own in zip(TOKENS.split(4), mask.split(4), strict=True)]
    whole, blocks = both(model, data, **ASKED)  # with the cache that some make where nobody says not to
    assert blocks.report.options["blocks"] == f"{where}: 2 blocks"
    assert_same(whole, blocks)


def runs(depth: int, **asked: Any) -> int:
    """How often a block computed, in both networks."""
    model = decoder(depth)
    count = 0
    original = Mixer.mixed

    def counted(self: Mixer, *given: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return original(self, *given)

    Mixer.mixed = counted  # type: ignore[method-assign]
    try:
        prune(model, [TOKENS], **ASKED, holdout=0, **asked)
    finally:
        Mixer.mixed = original  # type: ignore[method-assign]
    return count


def test_the_work_grows_with_the_depth_and_not_with_its_square() -> None:
    shallow, middle, deep = (runs(depth) for depth in (2, 4, 8))
    assert deep - middle == 2 * (middle - shallow)
    assert runs(8, blocks=None) > 2 * deep  # of which only the pruned network's grow so: the dense one of a small network is run once


def test_layers_with_one_input_share_one_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    original = support.eigen
    monkeypatch.setattr(support, "eigen", lambda G: made.append(G) or original(G))
    prune(decoder(1), [TOKENS], **ASKED, targets=["blocks.*"], blocks="blocks")
    assert len(made) == 4  # query and key; out; gate and up; down


def test_a_call_that_was_cut_off_goes_on_in_its_block(tmp_path: Any) -> None:
    data = list(TOKENS.split(4))
    expected = prune(decoder(), data, **ASKED)

    def stop(event: Any) -> None:
        if event.index == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(decoder(), data, **ASKED, checkpoint_dir=tmp_path / "kept", progress=stop)
    again = prune(decoder(), data, **ASKED, checkpoint_dir=tmp_path / "kept")
    assert again.report.options["checkpoint"]["resumed"] == 9
    assert same_bits(state_of(again.model), state_of(expected.model))


def test_inputs_of_a_sequential_of_tuples() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            hidden, scale = pair
            return hidden + self.second(torch.tanh(self.first(hidden)) * scale), scale

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(Pair(), Pair(), Pair())

        def forward(self, x: Tensor) -> Tensor:
            return self.body((x, x.mean(1, keepdim=True)))[0]

    torch.manual_seed(0)
    whole, blocks = both(Network(), samples(40, 8), **ASKED)
    assert blocks.report.options["blocks"] == "body: 3 blocks"
    assert_same(whole, blocks)


class Skipping(Decoder):
    """The last block is given what the first put out too."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, kept = self.enter(self.embed(tokens)), None
        none = torch.zeros(()).to(hidden)
        for block in self.blocks:
            if block is self.blocks[-1] and kept is not None:
                hidden = hidden + kept
            hidden, _ = block(hidden, odd_name=(none, {"turn": none}))
            kept = hidden if kept is None else kept
        return self.head(hidden)


class Telling(Decoder):
    """What a block is called with depends on what the ones before it computed."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.enter(self.embed(tokens))
        turn = torch.zeros(()).to(hidden)
        for block in self.blocks:
            hidden, _ = block(hidden, odd_name=(torch.zeros(()).to(hidden), {"turn": turn}))
            turn = hidden.mean()
        return self.head(hidden)


class Twice(Decoder):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.enter(self.embed(tokens))
        none = torch.zeros(()).to(hidden)
        for block in (*self.blocks, self.blocks[0]):
            hidden, _ = block(hidden, odd_name=(none, {"turn": none}))
        return self.head(hidden)


class Between(Decoder):
    """A layer of the network's own runs between the blocks; it is no part of what they are given."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.enter(self.embed(tokens))
        none = torch.zeros(()).to(hidden)
        other = 0
        for block in self.blocks:
            hidden, _ = block(hidden, odd_name=(none, {"turn": none}))
            if block is self.blocks[0]:
                other = self.head(self.embed(tokens))
        return hidden.sum(-1, keepdim=True) + other


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Skipping, "is not the output of the block before it"), (Telling, "depends on what the blocks before it compute"),
     (Twice, "runs 2 times in a forward pass"), (Between, "'head' is in no block and runs between them")],
)  # fmt: skip
def test_what_is_no_chain_of_blocks_is_run_whole_and_said(kind: type[Decoder], reason: str) -> None:
    model = decoder(3, kind)
    result = prune(model, [TOKENS], **ASKED)
    said = str(result.report.options["blocks"])
    assert said.startswith("none: ")
    assert reason in said
    assert result.report.certificate.holds
    assert same_bits(state_of(result.model), state_of(prune(model, [TOKENS], **ASKED, blocks=None).model))
    with pytest.raises(ArgumentError, match=r"blocks='blocks'.*leave blocks out"):
        prune(model, [TOKENS], **ASKED, blocks="blocks")
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_are_named_by_their_holder_by_globs_or_one_by_one() -> None:
    for given in ("blocks", "blocks.?", ["blocks.0", "blocks.1", "blocks.2"]):
        assert "3 blocks" in str(prune(decoder(), [TOKENS], **ASKED, blocks=given).report.options["blocks"])


@pytest.mark.parametrize("given", ["layers", ["blocks.0", "blocks.7"], 3, [], [3]])
def test_names_that_mean_no_block_are_refused(given: Any) -> None:
    with pytest.raises(ArgumentError, match="blocks"):
        prune(decoder(), [TOKENS], **ASKED, blocks=given)


def test_plain_layers_are_no_blocks() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    assert str(prune(model, samples(30, 6), sparsity=0.5).report.options["blocks"]).startswith("none: no nn.ModuleList")


def test_an_error_in_a_block_leaves_the_model_as_it_was() -> None:
    model = decoder()
    before = state_of(model)
    with torch.no_grad():
        model.blocks[1].up.weight *= 1e30  # type: ignore[union-attr, operator]
    changed = state_of(model)
    with pytest.raises(NetTrimError):
        prune(model, [TOKENS], **ASKED)
    assert same_bits(state_of(model), changed)
    assert not same_bits(before, changed)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


class Twice(torch.nn.Module):
    """Two convolutions of one input, of one shape: what they make rows of it by is not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.near(x)) * torch.sigmoid(self.far(x)) + x


@pytest.mark.parametrize("blocks", ("auto", None))
def test_convolutions_of_one_input_have_gram_matrices_of_their_own(blocks: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = torch.nn.Sequential(Twice(), Twice()), torch.randn(20, 4, 6, 6)
    found = prune(model, data, sparsity=0.5, fidelity="layer", allocation="uniform", blocks=blocks)
    monkeypatch.setattr(stages.Block, "observe", stages.Stage.observe)
    apart = prune(model, data, sparsity=0.5, fidelity="layer", allocation="uniform", blocks=blocks)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), apart.model.parameters(), strict=True))
