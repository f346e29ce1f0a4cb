"""The language model of the experiments: generation from the state, and its pieces."""

import pytest
import torch

from experiments import config as configuration
from experiments.baselines import MIXERS, make_mixer
from experiments.config import ConfigError
from experiments.models import DecoderLM, ModelConfig
from experiments.models.lm import generate
from experiments.optim import lr_factor, make_adamw

RACE = {"tables": 2, "planes": 2, "conv_size": 4, "norm_gate": True}
MODELS = {
    "race": ModelConfig(dim=16, heads=2, mixer="race", mixer_options=RACE),
    "race with decay": ModelConfig(dim=16, heads=2, mixer="race", mixer_options=RACE | {"decay": "per_token"}),
    "race with rope": ModelConfig(dim=16, heads=2, mixer="race", mixer_options={"rope": 10000.0}),
    "softmax": ModelConfig(dim=16, heads=2, mixer="softmax", mixer_options={"rope": 10000.0}, tie_embeddings=True),
    "learned positions": ModelConfig(dim=16, heads=2, mixer="softmax", positions="learned", max_length=64),
}


def model_of(name: str) -> DecoderLM:
    # float64: the two ways add in another order, and a tie of rounding errors must not decide a byte
    return DecoderLM(MODELS[name], seed=3).double().eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generated_text_equals_recomputation(name, temperature):
    model = model_of(name)
    prompt = torch.randint(256, (2, 7), generator=torch.Generator().manual_seed(0))
    texts = [
        generate(
            model,
            prompt,
            24,
            temperature=temperature,
            generator=torch.Generator().manual_seed(5),
            recompute=recompute,
        )
        for recompute in (False, True)
    ]
    assert texts[0].shape == (2, 24)
    assert torch.equal(*texts)


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_whole(name):
    model = model_of(name)
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    state, parts = None, []
    for part in tokens.split((5, 1, 14), dim=1):
        logits, state = model.step(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)
    assert state.tokens == 20


@pytest.mark.parametrize("name", MODELS)
def test_model_is_causal(name):
    model = model_of(name)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 256
    torch.testing.assert_close(model(changed)[:, :8], model(tokens)[:, :8])
    assert not torch.equal(model(changed)[:, 8], model(tokens)[:, 8])


def test_state_of_race_does_not_grow():
    model = model_of("race")
    _, short = model.step(torch.zeros(1, 3, dtype=torch.int64))
    _, long = model.step(torch.zeros(1, 50, dtype=torch.int64), short)
    for a, b in zip(short.layers, long.layers, strict=True):
        assert a.core.value_sum.shape == b.core.value_sum.shape


def test_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (DecoderLM(MODELS["race"], seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["blocks.0.mixer.hyperplanes"], c["blocks.0.mixer.hyperplanes"])
    assert not torch.equal(a["blocks.0.mixer.hyperplanes"], a["blocks.1.mixer.hyperplanes"])


def test_bad_generation_and_configuration_are_named():
    model = model_of("learned positions")
    with pytest.raises(ValueError, match="prompt: got shape"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="temperature: got -1"):
        generate(model, torch.zeros(1, 1, dtype=torch.int64), 3, temperature=-1)
    with pytest.raises(ValueError, match="max_length = 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ConfigError, match="mixer: got 'magic', allowed is one of race"):
        ModelConfig(mixer="magic")
    with pytest.raises(ConfigError, match="heads: got 3, allowed is a divisor of dim, 128"):
        ModelConfig(heads=3)
    with pytest.raises(ConfigError, match="mixer race with options"):
        make_mixer("race", 16, 2, causal=True, max_length=8, options={"tabels": 3})
    with pytest.raises(ConfigError, match="mixer: got 'magic'"):
        make_mixer("magic", 16, 2, causal=True, max_length=8, options={})
    assert "race" in MIXERS


def test_weight_decay_spares_norms_and_the_hash():
    options = RACE | {"decay": "per_token", "learn_hyperplanes": True}
    model = DecoderLM(ModelConfig(dim=16, heads=2, mixer_options=options))
    optimiser = make_adamw(model, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = ({names[p] for p in group["params"]} for group in optimiser.param_groups)
    assert not decayed & free
    assert len(decayed | free) == len(names)
    assert all(g["weight_decay"] == d for g, d in zip(optimiser.param_groups, (0.1, 0.0), strict=True))
    assert "blocks.0.mlp.down.weight" in decayed
    assert "blocks.0.mixer.q_proj.weight" in decayed
    for word in ("norm.weight", "log_beta", "hyperplanes", "decay_logit", "embedding.weight"):
        assert any(name.endswith(word) for name in free)
        assert not any(name.endswith(word) for name in decayed)


def test_learning_rate_rises_then_falls():
    assert lr_factor(0.0, 0.1, 0.2) == 0
    assert lr_factor(0.05, 0.1, 0.2) == pytest.approx(0.5)
    assert lr_factor(0.1, 0.1, 0.2) == pytest.approx(1)
    assert lr_factor(0.55, 0.1, 0.2) == pytest.approx(0.6)
    assert lr_factor(1.0, 0.1, 0.2) == pytest.approx(0.2)
    assert lr_factor(1e-9, 0.0, 0.0) == pytest.approx(1)


def test_configuration_errors_name_the_key(tmp_path):
    good = {"dim": 32, "mixer_options": {"tables": 2}}
    assert configuration.build(ModelConfig, good).mixer_options == {"tables": 2}
    for bad, message in (
        ({"dmi": 32}, r"dmi: unknown key \(did you mean 'dim'\?\)"),
        ({"dim": "32"}, "dim: got '32', allowed is of type int"),
        ({"dim": True}, "dim: got True"),
        ({"mlp_ratio": None}, "mlp_ratio: got None"),
        ({"dropout": 1.0}, r"dropout: got 1.0, allowed is in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            configuration.build(ModelConfig, bad)
    (tmp_path / "a.toml").write_text("dim = 32\n[mixer_options]\ntables = 2\n")
    (tmp_path / "a.json").write_text('{"dim": 32, "mixer_options": {"tables": 2}}')
    assert configuration.read(tmp_path / "a.toml") == configuration.read(tmp_path / "a.json") == good
    (tmp_path / "bad.toml").write_text("dim = ")
    for name in ("bad.toml", "absent.toml", "a.yaml"):
        with pytest.raises(ConfigError, match="config"):
            configuration.read(tmp_path / name)
    changed = configuration.override(good, ["dim=64", "mixer_options.decay=multiscale", "mixer_options.tables=3"])
    assert changed == {"dim": 64, "mixer_options": {"tables": 3, "decay": "multiscale"}}
    with pytest.raises(ConfigError, match="override"):
        configuration.override(good, ["dim"])
